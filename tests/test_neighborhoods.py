import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import lid

POINTS = np.random.default_rng(0).normal(size=(41, 3))


def expected(estimator, points, indices, queries):
    return jax.tree.map(np.asarray, jax.vmap(estimator)(points[indices] - queries[:, None]))


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_the_same_as_one_by_one(chunk_size, x64):
    indices = lid.nearest_neighbors(POINTS, 8).indices
    found = lid.over_neighborhoods(lid.ess, chunk_size=chunk_size)(POINTS, indices)
    np.testing.assert_allclose(found, expected(lid.ess, POINTS, indices, POINTS), rtol=1e-9)


def test_at_other_points_in_any_shape(x64):
    queries = np.random.default_rng(1).normal(size=(5, 3))
    indices = lid.nearest_neighbors(POINTS, 8, queries=queries).indices
    mapped = lid.over_neighborhoods(lid.tle)
    found = mapped(POINTS.reshape(-1, 3, 1), indices, queries.reshape(-1, 3, 1))
    np.testing.assert_allclose(found, expected(lid.tle, POINTS, indices, queries), rtol=1e-9)


def test_an_offset_costs_no_digits():
    indices = lid.nearest_neighbors(POINTS, 8).indices
    near = lid.over_neighborhoods(lid.abid)(POINTS, indices).value
    far = lid.over_neighborhoods(lid.abid)(POINTS + 1e6, indices).value
    np.testing.assert_allclose(far, near, rtol=1e-4)


def test_eight_devices_give_the_same():
    mesh = jax.make_mesh((8,), ("points",), axis_types=(jax.sharding.AxisType.Auto,))
    indices = lid.nearest_neighbors(POINTS, 8).indices
    one = lid.over_neighborhoods(lid.local_spectrum)(POINTS, indices)
    eight = lid.over_neighborhoods(lid.local_spectrum, mesh=mesh)(POINTS, indices)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_other_indices_are_refused():
    with pytest.raises(ValueError, match=r"`indices` has shape \(40, 8\); for 41 points"):
        lid.over_neighborhoods(lid.ess)(POINTS, np.zeros((40, 8), int))


@pytest.mark.parametrize("estimator", [lid.ess, lid.abid, lid.tle, lid.local_spectrum])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(estimator, platform):
    many = jax.jit(jax.vmap(estimator))
    shape = jax.ShapeDtypeStruct((4, 12, 5), jnp.float32)
    assert jax.export.export(many, platforms=[platform])(shape).platforms == (platform,)
