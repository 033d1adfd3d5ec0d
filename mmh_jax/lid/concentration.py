r"""How the norms and the angles of nearest neighbours concentrate: what DANCo reads.

Of the k + 1 nearest neighbours of a point (Ceruti et al. 2014, 1206.3881)

- the ratio rho = r_1 / r_{k+1} has, in d dimensions, the density k d rho^{d-1} (1 - rho^d)^{k-1};
  one d for all points by maximum likelihood;
- the angles between the first k, seen from the point, have a von Mises law: its mean direction nu
  and its concentration tau by maximum likelihood, with Fisher's (1993) approximation of the inverse
  of I_1 / I_0, at each point; then the means of nu and tau over the points.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmh_jax.lid.neighborhoods import check_offsets, over_neighborhoods
from mmh_jax.lid.neighbors import nearest_neighbors
from mmh_jax.typing import Array, ArrayLike, is_traced

__all__ = ["DENSE", "DancoStatistics", "check_sizes", "danco_statistics"]

# Where all neighbours are in one direction, at the end of a curve, the concentration would be
# infinite: a resultant of .99 is the most, a concentration of 50.
_LARGEST_RESULTANT = 0.99
# Below so many points all distances are taken at once.
DENSE = 256


class DancoStatistics(NamedTuple):
    """What DANCo reads from a sample.

    Attributes:
        norm: the dimension by the norms.
        direction, concentration: nu and tau of the angles.
    """

    norm: Array
    direction: Array
    concentration: Array


def danco_statistics(points: ArrayLike, num_neighbors: int = 10) -> DancoStatistics:
    """The dimension by the norms, and the law of the angles, of one sample.

    Args:
        points: (N, *shape).
        num_neighbors: k, from 2 to N - 2.

    Raises:
        TypeError: if `points` are not of a floating dtype.
        ValueError: if `num_neighbors` is out of range, or a value not finite.
    """
    flat = check_offsets("danco_statistics", points, least=4)
    check_sizes("danco_statistics", len(flat), num_neighbors)
    if is_traced(flat) and len(flat) > DENSE:
        raise ValueError(
            f"`danco_statistics(points=...)` has {len(flat)} points inside `jit`, where all "
            f"distances are in memory; at most {DENSE} can be. Call it from outside."
        )
    if not is_traced(flat):
        found = nearest_neighbors(np.asarray(points), num_neighbors + 1)
        distances, indices = jnp.asarray(found.distances), found.indices[:, :-1]
        nu, tau, used = _angles_at(points, indices)
    else:
        offsets = flat[None, :, :] - flat[:, None, :]
        largest = jnp.max(jnp.abs(offsets))
        unit = jnp.where(largest == 0, 1, largest)
        square = jnp.sum((offsets / unit) ** 2, axis=-1)
        square = jnp.where(jnp.eye(len(flat), dtype=bool), jnp.inf, square)
        negative, nearest = jax.lax.top_k(-square, num_neighbors + 1)
        distances = unit * jnp.sqrt(-negative)
        nu, tau, used = jax.vmap(lambda of, index: _von_mises(of[index]))(offsets, nearest[:, :-1])
    num = jnp.maximum(jnp.sum(used), 1)
    direction, concentration = (jnp.sum(jnp.where(used, x, 0)) / num for x in (nu, tau))
    return DancoStatistics(_norm_dimension(distances), direction, concentration)


def check_sizes(caller: str, num_points: int, num_neighbors: int) -> None:
    """Refuse a k that is too small, or more than the points have neighbours, less one."""
    if not 2 <= num_neighbors <= num_points - 2:
        raise ValueError(
            f"`{caller}(num_neighbors={num_neighbors})` must be from 2 to 2 less than the "
            f"{num_points} points."
        )


@jax.jit
def _norm_dimension(distances: Array) -> Array:
    """The root of the score of the ratios r_1 / r_{k+1}, over the points without duplicates."""
    k = distances.shape[1] - 1
    first, last = distances[:, 0], distances[:, -1]
    used = first != 0
    log = jnp.where(used, jnp.log(jnp.where(used, first / jnp.where(used, last, 1), 1)), 0)
    num, total = jnp.sum(used).astype(log.dtype), -jnp.sum(log)

    def rises(dim: Array) -> Array:
        """Whether the likelihood grows with d: num - d sum l + (k - 1) sum d l / (e^{d l} - 1)."""
        scaled = -dim * log
        grown = jnp.where(scaled > 0, scaled / jnp.expm1(jnp.where(scaled > 0, scaled, 1)), 1)
        return num - dim * total + (k - 1) * jnp.sum(jnp.where(used, grown, 0)) > 0

    # 0 < x / (e^x - 1) <= 1 keeps the root between these.
    low = num / jnp.where(total == 0, 1, total)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        up = rises(middle)
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (low, k * low))
    value = jnp.where(num == 0, 0, jnp.where(total == 0, jnp.inf, jnp.sqrt(low * high)))
    return value + 0 * jnp.sum(distances)  # NaN stays


def _von_mises(offsets: Array) -> tuple[Array, Array, Array]:
    """nu and tau of the angles between all pairs; and whether there is a pair."""
    largest = jnp.max(jnp.abs(offsets), axis=1, keepdims=True)
    used = largest[:, 0] != 0
    scaled = offsets / jnp.where(largest == 0, 1, largest)
    unit = scaled / jnp.linalg.norm(scaled + (largest == 0), axis=1, keepdims=True)
    cosine = jnp.clip(jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST), -1, 1)
    pairs = used[:, None] & used[None, :] & ~jnp.eye(len(used), dtype=bool)
    num = jnp.maximum(jnp.sum(pairs), 1)
    c = jnp.sum(jnp.where(pairs, cosine, 0)) / num
    s = jnp.sum(jnp.where(pairs, jnp.sqrt(1 - cosine**2), 0)) / num
    eta = jnp.minimum(jnp.hypot(c, s), _LARGEST_RESULTANT)
    small = 2 * eta + eta**3 + 5 * eta**5 / 6
    middle = -0.4 + 1.39 * eta + 0.43 / (1 - eta)
    large = 1 / (eta**3 - 4 * eta**2 + 3 * jnp.where(eta > 0.5, eta, 1))
    tau = jnp.where(eta < 0.53, small, jnp.where(eta < 0.85, middle, large))
    return jnp.arctan2(s, c), tau, jnp.sum(used) > 1


_angles_at = over_neighborhoods(_von_mises)
