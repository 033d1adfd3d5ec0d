"""The checks at the public boundary: what they refuse, what they say, what they let through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import denoise, noise
from mmh_jax.typing import Denoiser, Estimate, check_key, check_point


class Shaped:
    shape = (32, 32, 3)

    def __call__(self, x, sigma):
        return x


def identity(x, sigma):
    return x


def test_a_good_point_comes_back_as_arrays_of_one_dtype():
    x, sigma = check_point("f", identity, [1.0, 2.0], 3)
    assert isinstance(x, jax.Array)
    assert isinstance(sigma, jax.Array)
    assert (x.shape, sigma.shape) == ((2,), ())
    assert sigma.dtype == x.dtype == jnp.float32
    np.testing.assert_array_equal(x, [1.0, 2.0])
    assert sigma == 3
    half, sigma = check_point("f", identity, jnp.ones(2, jnp.bfloat16), jnp.float32(0.5))
    assert half.dtype == sigma.dtype == jnp.bfloat16
    x, sigmas = check_point("f", identity, jnp.ones(2), [0.1, 0.2], levels=1)
    np.testing.assert_allclose(sigmas, [0.1, 0.2], rtol=1e-6)
    with pytest.raises(ValueError, match="takes one noise level"):
        check_point("f", identity, jnp.ones(2), [0.1, 0.2])
    with pytest.raises(ValueError, match=r"`f\(sigmas=...\)` has shape \(\); it takes a vector"):
        check_point("f", identity, jnp.ones(2), 0.1, levels=1)


def test_a_good_point_keeps_double_precision(x64):
    x, sigma = check_point("f", identity, np.ones(2), np.float32(0.5))
    assert x.dtype == sigma.dtype == jnp.float64


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_a_point_is_real_and_floating(dtype):
    with pytest.raises(TypeError, match=rf"`caller\(x=...\)` has dtype {jnp.dtype(dtype)}.*astype"):
        check_point("caller", identity, jnp.ones(2, dtype), 0.1)


def test_a_point_has_the_shape_of_the_denoiser():
    good = jnp.ones((32, 32, 3))
    assert check_point("caller", Shaped(), good, 0.1)[0].shape == good.shape
    with pytest.raises(ValueError, match=r"\(7, 32, 32, 3\); .*takes \(32, 32, 3\).*`jax.vmap`"):
        check_point("caller", Shaped(), jnp.ones((7, 32, 32, 3)), 0.1)
    with pytest.raises(ValueError, match=r"`caller\(x=...\)` has shape \(3, 32\).*Pass one point"):
        check_point("caller", Shaped(), jnp.ones((3, 32)), 0.1)
    with pytest.raises(ValueError, match="Pass one point"):
        check_point("caller", Shaped(), jnp.ones((2, 7, 32, 32, 3)), 0.1)


def test_a_denoiser_without_a_shape_takes_any():
    network = denoise.from_function(identity, noise.VP())
    assert network.shape is None
    assert check_point("caller", network, jnp.ones((5, 2)), 0.1)[0].shape == (5, 2)
    listed = denoise.from_function(identity, noise.VP(), shape=(2,))
    with pytest.raises(ValueError, match=r"takes \(2,\)"):
        check_point("caller", listed, jnp.ones(3), 0.1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, [0.1, 0.0], [[0.1], [np.nan]]])
def test_a_noise_level_is_positive_and_finite(sigma):
    with pytest.raises(ValueError, match=r"(?s)`caller\(sigma=...\)` is .*finite positive number"):
        check_point("caller", identity, jnp.ones(2), sigma)


def test_traced_values_pass_but_their_shapes_and_dtypes_are_checked():
    @jax.jit
    def checked(x, sigma):
        return check_point("caller", Shaped(), x, sigma)

    x, sigma = checked(jnp.ones(Shaped.shape), -1.0)
    assert sigma == -1
    assert x.shape == Shaped.shape
    levels = jax.vmap(lambda s: check_point("caller", identity, jnp.ones(2), s)[1])(jnp.zeros(3))
    np.testing.assert_array_equal(levels, jnp.zeros(3))
    assert jax.grad(lambda s: check_point("caller", identity, jnp.ones(2), s)[1])(0.0) == 1
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        checked(jnp.ones((2, *Shaped.shape)), 0.1)
    with pytest.raises(TypeError, match="int32"):
        checked(jnp.ones(Shaped.shape, jnp.int32), 0.1)


def test_a_concrete_noise_level_is_checked_inside_jit_too():
    with pytest.raises(ValueError, match="finite positive"):
        jax.jit(lambda x: check_point("caller", identity, x, -1.0))(jnp.ones(2))


def test_a_key_is_typed_and_given():
    key = jax.random.key(3)
    assert check_key("caller", key) is key
    with pytest.raises(TypeError, match=r"`caller` is stochastic.*key=jax\.random\.key\(0\)"):
        check_key("caller", None)
    for wrong in (jax.random.PRNGKey(0), 0, np.zeros(2, np.uint32)):
        with pytest.raises(TypeError, match=r"`caller\(key=...\)` is not a typed key.*jax\.random"):
            check_key("caller", wrong)


def test_traced_and_many_keys_pass():
    keys = jax.random.split(jax.random.key(0), 3)
    assert check_key("caller", keys) is keys
    draw = jax.jit(jax.vmap(lambda key: jax.random.normal(check_key("caller", key))))
    np.testing.assert_array_equal(draw(keys), jax.vmap(jax.random.normal)(keys))


def test_the_protocol_is_checked_at_runtime():
    network = denoise.from_function(identity, noise.VP())
    models = [
        identity,
        Shaped(),
        network,
        denoise.Affine(network),
        denoise.Guided(network, network),
    ]
    assert all(isinstance(model, Denoiser) for model in models)
    assert not any(isinstance(model, Denoiser) for model in (1.0, "network", jnp.ones(2), None))


def test_an_estimate_is_a_pytree_of_two():
    estimate = jax.tree.map(lambda leaf: 2 * leaf, Estimate(1.0, 0.25))
    assert isinstance(estimate, Estimate)
    assert (estimate.value, estimate.stderr) == (2.0, 0.5)
