r"""Traces and spectra of a Jacobian that is only known through products with vectors.

A *trace strategy* is a value: `trace(matvec, like, key=key) -> Estimate(value, stderr)`, or a
`ChiSquareEstimate`, whose error grows with the trace (`rademacher`, `positive_lanczos`), where
`matvec` maps an array of the shape of `like` to another, linearly.  For FLIPD the operator is the
Jacobian of a denoiser, J = dD/dx.  For an exact denoiser J = Cov(x0 | x) / sigma^2 is symmetric and
positive semi-definite, with about d eigenvalues near 1 and the others near 0.  Hence

| strategy           | products             | standard error              | when                 |
|--------------------|----------------------|-----------------------------|----------------------|
| `exact`            | D                    | 0                           | whenever probes >= D |
| `rademacher`       | K                    | about sqrt(2 d / K) or less | D large, d > m / 2   |
| `xtrace`           | m                    | tiny once m > 2 d + a few   | D large, d < m / 2   |
| `hutchpp`          | m                    | tiny once m > 3 d + a few   | to compare           |
| `positive_exact`   | D, and D^3           | 0                           | trained networks     |
| `positive_lanczos` | 2 K order            | about sqrt(2 d / K)         | trained, D large     |

`positive_exact` projects: it sums the positive eigenvalues of the symmetrised Jacobian.  On an
exact denoiser that changes nothing; on a trained one, what it removes is network error.  With
`above_noise=True` it leaves out, too, what is no larger than the most negative eigenvalue.

`exact_diagonal` and `rademacher_diagonal` are strategies of the same form for a diagonal, an array
like a point; `products_of` tells what a strategy costs.
"""

from mmh_jax.linalg.hutchinson import (
    exact,
    exact_diagonal,
    hutchpp,
    rademacher,
    rademacher_diagonal,
)
from mmh_jax.linalg.operator import (
    Diagonal,
    Trace,
    jacobian,
    jacobian_spectrum,
    products_of,
)
from mmh_jax.linalg.spectral import (
    function_lanczos,
    positive_exact,
    positive_lanczos,
    symmetrised,
)
from mmh_jax.linalg.xtrace import xtrace

__all__ = [
    "Diagonal",
    "Trace",
    "exact",
    "exact_diagonal",
    "function_lanczos",
    "hutchpp",
    "jacobian",
    "jacobian_spectrum",
    "positive_exact",
    "positive_lanczos",
    "products_of",
    "rademacher",
    "rademacher_diagonal",
    "symmetrised",
    "xtrace",
]
