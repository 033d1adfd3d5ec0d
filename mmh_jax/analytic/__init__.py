r"""Exact denoisers: distributions whose posterior mean, density and FLIPD are closed forms.

For x = x0 + sigma * eps, with x0 drawn from one of these distributions,

    D(x; sigma)   = E[x0 | x]                                 `__call__(x, sigma)`
    rho_sigma(x)  = E[N(x; x0, sigma^2 I)]                    `log_density(x, sigma)`, normalised
    F(x; sigma)   = ambient_dim + d log rho_sigma(x) / d log sigma
                  = E[|x - x0|^2 | x] / sigma^2               `flipd(x, sigma)`, no Jacobian

The second line of F follows from differentiating under the expectation, and is what every class
evaluates, arranged so that nothing cancels as sigma -> 0, where F tends to the local intrinsic
dimension `lid(x)`.  As D is exact, F is also tr(dD/dx) + |x - D|^2 / sigma^2: the estimators of
`mmh_jax.lid` are tested against these classes.

| distribution     | support                     | dimension | cost per point   | parameters    |
|------------------|-----------------------------|-----------|------------------|---------------|
| `LinearGaussian` | affine subspace             | d         | O(D d)           | basis, scales |
| `Sphere`         | S^d, uniform or von Mises   | d         | O(D)             | radius, tilt  |
| `Empirical`      | N points, a training set    | 0         | O(N D), streamed | the points    |
| `Mixture`        | union of the above          | varies    | the sum          | weights       |

All are pytrees: parameters can be differentiated, batched with `jax.vmap`, and passed to `jax.jit`.
Results have the dtype of their inputs; contractions ask for full precision on every backend.
`denoiser_of` makes the distribution of a named set of `data.registry`, if it is one of these.
"""

from mmh_jax.analytic.base import Distribution
from mmh_jax.analytic.empirical import Empirical
from mmh_jax.analytic.gaussian import LinearGaussian
from mmh_jax.analytic.known import denoiser_of
from mmh_jax.analytic.mixture import Mixture
from mmh_jax.analytic.sphere import Sphere, von_mises, von_mises_with_atom

__all__ = [
    "Distribution",
    "Empirical",
    "LinearGaussian",
    "Mixture",
    "Sphere",
    "denoiser_of",
    "von_mises",
    "von_mises_with_atom",
]
