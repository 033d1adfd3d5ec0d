r"""The dimension of what a decoder generates: the rank of its Jacobian, and inversion to find it.

A decoder x = g(z) (of a GAN, a VAE or a flow) maps R^d_z into R^D.  Where the rank r of J = dg/dz
is constant around z, the image of g is there a manifold of dimension r, with the left singular
vectors of J as its tangents (constant rank theorem).  The singular values s_i say how far a unit
step of the latent moves x.

A decoder has no noise level of its own.  Under observation noise sigma, in data units, with
z ~ N(0, I) and g replaced by its linearisation, x is Gaussian of covariance J J^T, whose denoiser
has the Jacobian J J^T (J J^T + sigma^2 I)^-1, of trace

    rank_at_noise = sum_i s_i^2 / (s_i^2 + sigma^2):

FLIPD's trace.  It counts the directions that a standard deviation of z moves further than sigma.

Of a point x given as data, the latent is found first, by nonlinear least squares

    z = argmin |g(z) - x|^2 + w |z|^2                        (`invert`, Levenberg-Marquardt)

from several starts, as the problem is not convex.  With w = sigma^2 it is the maximum a posteriori
latent under noise sigma.  Then the spectrum is taken at z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmh_jax import linalg
from mmh_jax.linalg.operator import safe_sqrt
from mmh_jax.typing import Array, ArrayLike, Key, check_key, check_level

__all__ = ["Inverse", "decoder_spectrum", "invert", "rank_at_noise"]

Decoder = Callable[[Array], Array]


class Inverse(NamedTuple):
    """A latent whose image is close to a given point, and how close.

    Attributes:
        z: the latent, of shape `latent_shape`.
        residual: |g(z) - x|, in data units; that of the best start, NaN if all ended in NaN.
        converged: whether the solver stopped because it stood still.  That may be in a local
            minimum: only a small `residual` says that x is in the image.
    """

    z: Array
    residual: Array
    converged: Array


def _floating(caller: str, name: str, value: ArrayLike) -> Array:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}({name}=...)` has dtype {value.dtype}; it must be real. Convert it, for "
            f"example `{name}.astype(float)`."
        )
    return value


def _image_of(caller: str, decoder: Decoder, z: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `decoder(z)`, which must be one array."""
    image = jax.eval_shape(decoder, z)
    if not isinstance(image, jax.ShapeDtypeStruct) or not jnp.issubdtype(image.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}(decoder=...)` returns {image}; it must return one real array. Pick it, for "
            "example `lambda z: decoder(z)[0]`."
        )
    return image


def decoder_spectrum(decoder: Decoder, z: ArrayLike, *, chunk_size: int = 32) -> Array:
    """Singular values of dg/dz at one latent, largest first.

    The dimension of the image at g(z) is their number above zero.  They have no natural unit, so
    read them relative to the largest or to a noise level:

        rank_by_gap(values, floor=1e-4)             the largest fall; nothing below 1e-4 of the top
        rank_by_threshold(values / values[0], 1e-3)
        rank_at_noise(values, sigma)                smooth, in data units

    In float32 a zero comes out as up to about 1e-6 of the largest value: look no further down.

    Args:
        decoder: x = g(z), one latent to one point, arrays of any shape; in evaluation mode, without
            dropout.  For a decoder of batches, `lambda z: decoder(z[None])[0]`.
        z: one latent, of any shape with d_z entries.
        chunk_size: tangents pushed through the network at once.

    Returns:
        (min(d_z, D),), in data units per unit of the latent.

    Cost: one evaluation, then d_z JVPs, or D VJPs if D < d_z; the SVD of a D x d_z matrix, which is
    held in memory.  No bias, no randomness; it sees the image of g near z only, not that of other
    latents with the same x.

    Raises:
        TypeError: if `z` is not of a floating dtype, or the decoder returns anything but one array.
        ValueError: if `chunk_size` is not a positive integer.

    References: Shao, Kumar & Fletcher 2018 (1711.08014), the Riemannian geometry of J^T J.

    >>> cylinder = lambda z: jnp.stack([jnp.cos(z[0]), jnp.sin(z[0]), z[1] + z[2]])
    >>> decoder_spectrum(cylinder, jnp.zeros(3)).round(3)
    Array([1.414, 1.   , 0.   ], dtype=float32)
    """
    z = _floating("decoder_spectrum", "z", z)
    if z.size <= _image_of("decoder_spectrum", decoder, z).size:
        matvec, like = jax.linearize(decoder, z)[1], z
    else:
        like, pullback = jax.vjp(decoder, z)
        matvec = lambda v: pullback(v)[0]  # noqa: E731
    matrix = linalg.jacobian(matvec, like, chunk_size=chunk_size)
    # Not the eigenvalues of J^T J, which lose those below 3e-4 of the largest in float32.
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return jnp.linalg.svd(matrix, compute_uv=False)


def rank_at_noise(singular_values: ArrayLike, sigma: ArrayLike) -> Array:
    """A smooth count of the directions wider than a noise level: sum s^2 / (s^2 + sigma^2).

    The trace of the denoiser of the linearised decoder, hence FLIPD's without its residual term.
    It falls short of the rank by sum sigma^2 / (s^2 + sigma^2).

    Args:
        singular_values: (..., n), as from `decoder_spectrum`, of a decoder of z ~ N(0, I).
        sigma: the noise level, in data units; several broadcast against the leading axes, so that
            n values and S levels make a curve of S.

    Raises:
        TypeError, ValueError: if the values are not of a floating dtype, or `sigma` not positive.

    >>> rank_at_noise(jnp.array([10.0, 1.0, 0.0]), jnp.array([0.01, 1.0])).round(2)
    Array([2.  , 1.49], dtype=float32)
    """
    values = _floating("rank_at_noise", "singular_values", singular_values)
    sigma = check_level("rank_at_noise", sigma, values.dtype)[..., None]
    return jnp.sum((values / jnp.hypot(values, sigma)) ** 2, axis=-1)


def invert(
    decoder: Decoder,
    x: ArrayLike,
    *,
    latent_shape: tuple[int, ...],
    key: Key,
    num_starts: int = 8,
    max_steps: int = 256,
    prior_weight: ArrayLike = 0.0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Inverse:
    """Find a latent z with g(z) as close to x as can be: Levenberg-Marquardt from several starts.

    The starts are draws from N(0, I); the one that ends lowest is kept.  A start
    that ends in NaN never displaces one that did not; one that was cut off may, if it is lower,
    and then `converged` says so.  Where g is not injective, or x is not in its
    image, z is one of many answers or the closest found: look at `residual`.

    Args:
        decoder: x = g(z), as for `decoder_spectrum`; twice differentiable, or nearly.
        x: one point, of the shape of g(z).
        latent_shape: of z.
        key: draws the starts.
        num_starts: 1 suffices for a decoder close to linear; local minima need more.
        max_steps: of each start, after which it counts as not converged.
        prior_weight: w >= 0, in squared data units.  Positive, it makes z unique along directions
            that g ignores, and biases the image towards that of z = 0.
        rtol: a start has converged when a step changes z and g(z) by less than
            `atol + rtol * |value|` in every entry; by default eps^(3/4), 6e-6 in float32.
        atol: likewise; of g(z) relative to the largest entry of x and of the start's image.

    Returns:
        `Inverse`.  Wrap it in `jax.jit` to compile once, and `jax.vmap` over x for many points;
        all points and starts then run until the last has stopped.

    Cost: for each start and step 1 evaluation, d_z + 1 JVPs and the QR of a matrix of D + 2 d_z
    rows and d_z columns.  Memory: `num_starts` times d_z
    tangents of the whole network, and as many of those matrices.

    Raises:
        TypeError: if `x` is not of a floating dtype, `key` is not a typed key, or the decoder
            returns anything but one array.
        ValueError: if g(z) has not x's shape, a number of starts or steps is not positive, or
            `prior_weight` is not one number of at least 0 (a traced one below makes the residual
            NaN).

    References: Levenberg 1944; Marquardt 1963; Nocedal & Wright 2006, ch. 10.3.

    >>> curve = lambda z: jnp.concatenate([jnp.sin(z), jnp.exp(z)])
    >>> x = jnp.array([0.0, 1.0])
    >>> found = invert(curve, x, latent_shape=(1,), key=jax.random.key(0))
    >>> bool(found.residual < 1e-5), bool(found.converged)
    (True, True)
    >>> decoder_spectrum(curve, found.z).round(3)
    Array([1.414], dtype=float32)
    """
    x = _floating("invert", "x", x)
    key = check_key("invert", key)
    for name, value in (("num_starts", num_starts), ("max_steps", max_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`invert({name}={value!r})` must be an integer of at least 1.")
    is_traced = isinstance(prior_weight, Tracer)
    if jnp.ndim(prior_weight) != 0 or not (is_traced or float(np.asarray(prior_weight)) >= 0):
        raise ValueError(
            f"`invert(prior_weight={prior_weight})` must be one number, 0 or positive: the "
            "variance of the noise, in squared data units."
        )
    _check_shapes(decoder, x, latent_shape)
    tolerance = float(jnp.finfo(x.dtype).eps) ** 0.75
    tolerances = tolerance if rtol is None else rtol, tolerance if atol is None else atol
    starts = jax.random.normal(key, (num_starts, *latent_shape), x.dtype)
    weight = jnp.asarray(prior_weight, x.dtype)
    return _best(decoder, x, starts, weight, max_steps, tolerances)


def _check_shapes(decoder: Decoder, x: Array, latent_shape: tuple[int, ...]) -> None:
    image = _image_of("invert", decoder, jax.ShapeDtypeStruct(latent_shape, x.dtype))
    if image.shape != x.shape:
        many = x.shape[1:] == image.shape
        cure = "Did you mean `jax.vmap`?" if many else "Pass one point of that shape."
        raise ValueError(
            f"`invert(x=...)` has shape {x.shape}; this decoder returns {image.shape} from a "
            f"latent of shape {latent_shape}. {cure}"
        )


def _misfit(z: Array, problem: tuple[Decoder, Array, Array, Array]) -> tuple[Array, Array]:
    """The two blocks whose squares are summed, in units of `scale`."""
    decoder, x, weight, scale = problem
    image = decoder(z.astype(x.dtype)).astype(z.dtype)
    return (image - x) / scale, safe_sqrt(weight) / scale * z


def _best(
    decoder: Decoder,
    x: Array,
    starts: Array,
    weight: Array,
    max_steps: int,
    tolerances: tuple[float, float],
) -> Inverse:
    """Solve from every start and keep the lowest."""
    import optimistix  # here, so that `import mmh_jax` stays quick

    solver = optimistix.LevenbergMarquardt(*tolerances)

    def solve(start: Array) -> tuple[Array, Array, Array, Array]:
        # In units of the data's size, one damping and one tolerance serve pixels and bytes.
        scale = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(decoder(start))))
        scale = jax.lax.stop_gradient(jnp.where(scale > 0, scale, 1))
        # Optimistix keeps its damping in the default precision, and wants the latent in it too.
        start = start.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))
        solution = optimistix.least_squares(
            _misfit,
            solver,
            start,
            args=(decoder, x, weight, scale),
            max_steps=max_steps,
            throw=False,
        )
        z = solution.value.astype(x.dtype)
        residual2 = jnp.sum((decoder(z) - x) ** 2)
        objective = residual2 + weight * jnp.sum(z**2)
        succeeded = solution.result == optimistix.RESULTS.successful
        return z, residual2, objective, succeeded & jnp.isfinite(objective)

    z, residual2, objective, converged = jax.vmap(solve)(starts)
    best = jnp.argmin(jnp.where(jnp.isnan(objective), jnp.inf, objective))
    residual = jnp.where(jnp.isnan(objective[best]) | (weight < 0), jnp.nan, residual2[best])
    return Inverse(z[best], jnp.sqrt(residual), converged[best])
