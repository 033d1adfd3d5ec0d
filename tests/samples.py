"""Samples that tests of the estimators of data share."""

import jax
import numpy as np

from mmh_jax import analytic
from mmh_jax.data import curved, manifolds


def many(estimator, samples):
    """The estimator at each sample, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(estimator))(samples))


def ball(dim, num_points, num=1, ambient_dim=None, seed=0):
    """Uniform in the unit ball, isometrically in R^ambient_dim: (num, num_points, ambient_dim)."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(num, num_points, dim))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    points = direction * rng.uniform(size=(num, num_points, 1)) ** (1 / dim)
    frame = np.linalg.qr(rng.normal(size=(ambient_dim or dim, dim)))[0]
    return points @ frame.T


def manifolds_of_three():
    mixture = manifolds.affine_mixture((2, 5), 8, key=jax.random.key(0))
    roll = curved.swiss_roll(300, key=jax.random.key(2))
    return {
        "affine 2+5 in 8": mixture.sample(300, key=jax.random.key(1)).points,
        "swiss roll": roll.points,
        "sphere 4 in 5": analytic.Sphere(4, 1.0).sample(300, key=jax.random.key(3)),
    }
