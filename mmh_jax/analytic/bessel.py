r"""Modified Bessel functions of the first kind as the von Mises-Fisher distribution needs them.

For an order nu >= 0 and k >= 0, w = k^2,

    log_normaliser  G(w) = log[ Gamma(nu + 1) (k/2)^-nu I_nu(k) ],        G(0) = 0
    ratio           h(w) = I_{nu+1}(k) / (k I_nu(k)) = 2 dG/dw,           h(0) = 1 / (2 nu + 2)
    complement      B(k) = 1 - k h,       scaled_log_normaliser  G - k.

G and h are analytic in w: a function of a vector c through w = |c|^2 is smooth at c = 0.

*Large nu^2 + w.*  The uniform (Debye) expansions of I and I' (NIST DLMF 10.41), written in
rho = sqrt(nu^2 + w), s = 1/rho and y = (nu s)^2.  There U_j(p) / nu^j = s^j P_j(y), with P_j a
polynomial of degree j, so that the expansion does not need a large order: at nu = 0 it is Hankel's.
From V_{j+1} - U_{j+1} = -(1 - p^2)(p U_j / 2 + p^2 U_j'), with Q_j = (j + 1/2) P_j + 2 y P_j',

    h = 1/(nu + rho) - s^2 S,      B = (nu + nu^2/(rho + k)) / (nu + rho) + k s^2 S,
    G = (rho - nu) - nu log((nu + rho)/(2 nu)) - log(rho)/2 + const(nu) + log sum_j s^j P_j,

with S = sum_j s^j Q_j / sum_j s^j P_j.  The terms of B are all positive to leading order.

*Small nu^2 + w.*  The same at a higher order, and down again by the stable backward recursion

    h_nu = 1 / d,    B_nu = (2(nu+1) - k B_{nu+1}) / d,    G_nu = G_{nu+1} + log(d / (2(nu+1))),

with d = 2(nu+1) + w h_{nu+1}.

Orders are static Python numbers; everything is differentiable by plain automatic differentiation.
Measured against 60 digits for k from 1e-6 to 1e8 and nu from 0 to 400: h and its first derivative
within a few units in the last place, B within ten, in float32 and float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.typing import Array

__all__ = ["complement", "log_normaliser", "ratio", "scaled_log_normaliser"]

# The first omitted term of the expansion is below the rounding of float64 once nu^2 + w reaches
# the square of _LARGE: it is about (n-1)! / (pi (2 _LARGE)^n) for n = _NUM_TERMS.
_LARGE = 24
_NUM_TERMS = 20


def _debye_polynomials(num_terms: int) -> np.ndarray:
    """Coefficients of P_j and Q_j in y, (2, j, power), from exact fractions.

    DLMF 10.41.9: U_{j+1} = p^2 (1 - p^2) U_j' / 2 + (1/8) int_0^p (1 - 5 t^2) U_j dt, with
    U_j = p^j P_j(p^2); term by term on p^m, m = j + 2 i.
    """
    table = np.zeros((2, num_terms, num_terms))
    row = [Fraction(1)]
    for j in range(num_terms):
        following = [Fraction(0)] * (len(row) + 1)
        for i, coefficient in enumerate(row):
            m = j + 2 * i
            table[:, j, i] = float(coefficient), float((m + Fraction(1, 2)) * coefficient)
            following[i] += coefficient * (Fraction(m, 2) + Fraction(1, 8 * (m + 1)))
            following[i + 1] -= coefficient * (Fraction(m, 2) + Fraction(5, 8 * (m + 3)))
        row = following
    return table


_POLYNOMIALS = _debye_polynomials(_NUM_TERMS)


def _debye(nu: float, w: Array) -> tuple[Array, Array, Array]:
    """rho, sum_j s^j P_j(y) and sum_j s^j Q_j(y)."""
    rho = jnp.sqrt(nu**2 + w)
    s = 1 / rho
    exponents = np.arange(_NUM_TERMS)
    # At nu = 0 only y^0 = 1 is left; 0^0 has no second derivative.
    y_powers = (nu * s) ** (2 * exponents) if nu else jnp.asarray(exponents == 0, w.dtype)
    table = jnp.asarray(_POLYNOMIALS, w.dtype)
    # One sum over powers of s and y: Horner's scheme is no more accurate, and slower to compile.
    sums = jnp.sum(table * (s**exponents)[:, None] * y_powers, axis=(1, 2))
    return rho, sums[0], sums[1]


def _ratio_debye(nu: float, w: Array) -> Array:
    rho, p_sum, q_sum = _debye(nu, w)
    return 1 / (nu + rho) - q_sum / p_sum / rho**2


def _complement_debye(nu: float, w: Array) -> Array:
    rho, p_sum, q_sum = _debye(nu, w)
    k = jnp.sqrt(w)
    return (nu + nu**2 / (rho + k)) / (nu + rho) + k * (q_sum / p_sum / rho**2)


def _stirling(nu: float) -> float:
    """log Gamma(nu+1) - nu log nu + nu - log(2 pi)/2; a series where the difference cancels."""
    if nu >= _LARGE:
        series = 1 / 12 - (1 / 360 - (1 / 1260 - 1 / (1680 * nu**2)) / nu**2) / nu**2
        return math.log(nu) / 2 + series / nu
    return math.lgamma(nu + 1) - (nu and nu * math.log(nu)) + nu - math.log(2 * math.pi) / 2


def _log_normaliser_debye(nu: float, w: Array, subtract_k: bool) -> Array:
    rho, p_sum, _ = _debye(nu, w)
    excess = w / (rho + nu)  # rho - nu
    # rho - nu - k, for the scaled function, without the cancellation.
    linear = nu**2 / (rho + jnp.sqrt(w)) - nu if subtract_k else excess
    entropy = nu * jnp.log1p(excess / (2 * nu)) if nu else 0.0
    return linear - entropy - jnp.log(rho) / 2 + _stirling(nu) + jnp.log(p_sum)


def _descent(nu: float, w: Array) -> tuple[float, Array]:
    """The order at which the recursion starts, and 2(nu+1) for each order it reaches."""
    steps = math.ceil(_LARGE - nu)
    return nu + steps, jnp.asarray(2 * (nu + 1 + np.arange(steps)[::-1]), w.dtype)


def _ratio_recursion(nu: float, w: Array) -> Array:
    top, doubles = _descent(nu, w)

    def step(h: Array, double: Array) -> tuple[Array, None]:
        return 1 / (double + w * h), None

    return jax.lax.scan(step, _ratio_debye(top, w), doubles)[0]


def _complement_recursion(nu: float, w: Array) -> Array:
    top, doubles = _descent(nu, w)
    k = jnp.sqrt(w)

    def step(carry: tuple[Array, Array], double: Array) -> tuple[tuple[Array, Array], None]:
        h, b = carry
        denominator = double + w * h
        return (1 / denominator, (double - k * b) / denominator), None

    return jax.lax.scan(step, (_ratio_debye(top, w), _complement_debye(top, w)), doubles)[0][1]


def _log_normaliser_recursion(nu: float, w: Array, subtract_k: bool) -> Array:
    top, doubles = _descent(nu, w)

    def step(carry: tuple[Array, Array], double: Array) -> tuple[tuple[Array, Array], None]:
        h, g = carry
        return (1 / (double + w * h), g + jnp.log1p(w * h / double)), None

    start = (_ratio_debye(top, w), _log_normaliser_debye(top, w, subtract_k))
    return jax.lax.scan(step, start, doubles)[0][1]


def _select(
    nu: float, w: Array, debye: Callable[..., Array], recursion: Callable[..., Array], *args: bool
) -> Array:
    """The expansion where it is accurate, else the recursion; gradients see only the one used."""
    if nu >= _LARGE:
        return debye(nu, w, *args)
    least = _LARGE**2 - nu**2
    large = w >= least
    # The branch that is not selected gets an argument at which it and its derivatives are finite.
    return jnp.where(
        large,
        debye(nu, jnp.where(large, w, least), *args),
        recursion(nu, jnp.where(large, 1.0, w), *args),
    )


@functools.partial(jax.jit, static_argnums=0)
def ratio(nu: float, w: Array) -> Array:
    """h(w) = I_{nu+1}(k) / (k I_nu(k)) at k = sqrt(w).

    >>> ratio(0.5, jnp.asarray(0.0))  # 1 / (2 nu + 2)
    Array(0.33333334, dtype=float32)
    """
    return _select(nu, w, _ratio_debye, _ratio_recursion)


@functools.partial(jax.jit, static_argnums=0)
def complement(nu: float, k: Array) -> Array:
    """B(k) = 1 - I_{nu+1}(k) / I_nu(k), accurate where it is small; k > 0.

    >>> k = jnp.asarray(1e6)
    >>> k * complement(0.5, k)  # 1 - coth(k) + 1/k, times k
    Array(1., dtype=float32)
    """
    return _select(nu, k**2, _complement_debye, _complement_recursion)


@functools.partial(jax.jit, static_argnums=0)
def log_normaliser(nu: float, w: Array) -> Array:
    """G(w) = log[Gamma(nu+1) (k/2)^-nu I_nu(k)] at k = sqrt(w); dG/dw = ratio / 2."""
    return _select(nu, w, _log_normaliser_debye, _log_normaliser_recursion, False)


@functools.partial(jax.jit, static_argnums=0)
def scaled_log_normaliser(nu: float, k: Array) -> Array:
    """G(k^2) - k, of moderate size for every k > 0; its derivative in k is -complement."""
    return _select(nu, k**2, _log_normaliser_debye, _log_normaliser_recursion, True)
