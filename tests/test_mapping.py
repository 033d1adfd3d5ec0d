"""A function over many points: the result may not depend on chunks, devices or progress."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, denoise, lid, linalg, mapping

NUM = 13  # prime: no chunk and no number of devices divides it


class Outcome(NamedTuple):
    square: jax.Array
    nested: dict


def points(num=NUM, dim=4, seed=0):
    return np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)


def outcome(x):
    return Outcome(x * x, {"sum": x[0] + x[1], "shape": jnp.zeros((2, 3)) + x[2]})


def gaussian(seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(4, 2)))[0]
    return analytic.LinearGaussian(
        jnp.asarray(rng.normal(size=4), jnp.float32),
        jnp.asarray(basis, jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2, size=2), jnp.float32),
    )


def mesh(num_devices, shape=None):
    if jax.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} devices; XLA_FLAGS was set to fewer")
    shape = (num_devices,) if shape is None else shape
    names = ("data", "model")[: len(shape)]
    automatic = (jax.sharding.AxisType.Auto,) * len(shape)
    devices = jax.devices()[:num_devices]
    return jax.make_mesh(shape, names, axis_types=automatic, devices=devices)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, NUM])
def test_elementwise_results_are_those_of_numpy_for_every_chunk_size(chunk_size):
    x = points()
    result = mapping.over_points(outcome, chunk_size=chunk_size)(x)
    assert isinstance(result, Outcome)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result))
    np.testing.assert_array_equal(result.square, x * x)
    np.testing.assert_array_equal(result.nested["sum"], x[:, 0] + x[:, 1])
    np.testing.assert_array_equal(
        result.nested["shape"], np.broadcast_to(x[:, 2, None, None], (NUM, 2, 3))
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_matrix_products_agree_to_rounding(chunk_size):
    x, matrix = points(), points(num=4, seed=1)
    multiply = mapping.over_points(lambda m, x: m @ x, (None, 0), chunk_size=chunk_size)
    np.testing.assert_allclose(multiply(matrix, x), x @ matrix.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [None, 3])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_keys_are_split_by_position_before_chunking(chunk_size, devices):
    def draw(x, *, key):
        return x + jax.random.normal(key, x.shape), jax.random.key_data(key)

    x, key = points(), jax.random.key(3)
    placed = None if devices is None else mesh(devices)
    draws, used = mapping.over_points(draw, chunk_size=chunk_size, mesh=placed)(x, key=key)
    keys = jax.random.split(key, NUM)
    np.testing.assert_array_equal(used, jax.random.key_data(keys))
    expected = jax.vmap(lambda x, key: draw(x, key=key)[0])(x, keys)
    np.testing.assert_allclose(draws, expected, rtol=1e-5, atol=1e-6)
    part = slice(2, 9)  # with its keys a part has the numbers of the whole
    _, used = mapping.over_points(draw, chunk_size=chunk_size, mesh=placed)(x[part], key=keys[part])
    np.testing.assert_array_equal(used, jax.random.key_data(keys[part]))


def test_pytrees_shared_arguments_and_points_of_any_shape():
    images = points(dim=12).reshape(NUM, 2, 3, 2)
    labels = np.arange(NUM)

    def function(pair, scale, offsets):
        return scale * pair["image"].sum((0, 1)) + pair["label"] + offsets["b"]

    mapped = mapping.over_points(function, (0, None, None), chunk_size=4)
    result = mapped({"image": images, "label": labels}, 2.0, {"b": np.ones(2, np.float32)})
    expected = 2 * images.sum((1, 2)) + labels[:, None] + 1
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    both = mapping.over_points(lambda x, y: x - y, 0, chunk_size=5)(images, images[::-1])
    np.testing.assert_array_equal(both, images - images[::-1])


@pytest.mark.parametrize(
    ("chunk_size", "devices", "expected"),
    [
        (5, None, [5, 10, 13]),
        (1, None, list(range(1, 14))),
        (64, None, [13]),
        (2, 4, [8, 13]),
        (2, 8, [13]),
    ],
)
def test_progress_goes_to_completion(chunk_size, devices, expected):
    calls = []
    mapping.over_points(
        lambda x: x,
        chunk_size=chunk_size,
        progress=lambda done, total: calls.append((done, total)),
        mesh=None if devices is None else mesh(devices),
    )(points())
    assert calls == [(done, NUM) for done in expected]


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
@pytest.mark.parametrize("num", [3, 13, 16])
@pytest.mark.parametrize("chunk_size", [1, 64])
def test_eight_devices_give_what_one_gives(shape, num, chunk_size):
    x, key = points(num), jax.random.key(1)
    model = gaussian(0)

    def function(model, x, *, key):
        estimate = lid.flipd(model, x, 0.5, trace=linalg.rademacher(4), key=key)
        return x * x, estimate

    map_over = partial(mapping.over_points, function, (None, 0), chunk_size=chunk_size)
    square, estimate = map_over(mesh=mesh(8, shape))(model, x, key=key)
    _, alone = map_over()(model, x, key=key)
    np.testing.assert_array_equal(square, x * x)
    np.testing.assert_allclose(estimate.value, alone.value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(estimate.stderr, alone.stderr, rtol=1e-3, atol=1e-5)


def test_each_device_computes_its_own_points_only():
    shapes = []

    def function(x):
        shapes.append(x.shape)
        return x.sum()

    function_of_batch = jax.custom_batching.custom_vmap(function)

    @function_of_batch.def_vmap
    def _(axis_size, in_batched, x):
        shapes.append((axis_size, *x.shape))
        return x.sum(-1), True

    x = points(40)
    result = mapping.over_points(function_of_batch, chunk_size=3, mesh=mesh(8))(x)
    np.testing.assert_allclose(result, x.sum(1), rtol=1e-5, atol=1e-6)
    assert (3, 3, 4) in shapes  # 3 points per device, not 24


@pytest.mark.parametrize("devices", [None, 8])
def test_compiled_once_for_all_denoisers_of_one_structure(devices):
    traces = []

    def function(model, x, sigma):
        traces.append(x.shape)
        return lid.flipd(model, x, sigma).value

    placed = None if devices is None else mesh(devices)
    mapped = mapping.over_points(function, (None, 0, None), chunk_size=4, mesh=placed)
    x = points()
    for seed in range(3):
        for sigma in (0.1, 0.7):
            model = gaussian(seed)
            result = mapped(model, x, sigma)
            expected = [model.flipd(point, sigma) for point in jnp.asarray(x)]
            np.testing.assert_allclose(result, expected, rtol=1e-3)
    assert traces == [(4,)]  # once for all, a last chunk of one point included
    wrapped = denoise.Affine(gaussian(0), 1.0, 2.0)
    mapped(wrapped, x, 0.1)
    mapped(denoise.Affine(gaussian(1), 0.0, 1.0), x, 0.1)
    assert len(traces) == 2  # a new structure, once


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: mapping.over_points(jnp.sin, chunk_size=0),
            ValueError,
            "=0.*at least 1",
        ),
        (lambda: mapping.over_points(jnp.sin, chunk_size=2.0), ValueError, "chunk_size=2.0"),
        (
            lambda: mapping.over_points(jnp.add)(points(3), points(4)),
            ValueError,
            r"\[3, 4\] points; they must all have the same number",
        ),
        (lambda: mapping.over_points(jnp.sin)(points(0)), ValueError, "at least one"),
        (
            lambda: mapping.over_points(jnp.sin)(
                points(3), key=jax.random.split(jax.random.key(0), 2)
            ),
            ValueError,
            r"shape \(2,\) for 3 points; pass one key, or one for each point",
        ),
        (lambda: mapping.over_points(jnp.sin, 1)(points()), ValueError, "jnp.moveaxis"),
        (lambda: mapping.over_points(jnp.sin, (0, None))(points()), ValueError, "1 arguments"),
        (lambda: mapping.over_points(jnp.sin, (None,))(points()), ValueError, "at least one 0"),
        (lambda: mapping.over_points(jnp.sin)([1.0, 2.0]), ValueError, "holds a scalar"),
        (
            lambda: mapping.over_points(lambda f, x: f(x), (None, 0))(jnp.sin, points()),
            TypeError,
            "Close over functions and settings",
        ),
    ],
)
def test_errors_name_argument_fault_and_cure(call, error, text):
    with pytest.raises(error, match=text):
        call()
