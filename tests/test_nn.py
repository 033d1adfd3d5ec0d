"""The residual MLP and the split of a module into a function and its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmh_jax import denoise, nn


def test_per_example_call_is_the_batched_call():
    apply, params = nn.split(nn.ResidualMLP((2, 3), width=16, depth=2, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    x = jax.random.normal(jax.random.key(0), (5, 2, 3))
    levels = jnp.linspace(-1, 1, 5)
    batched = jax.vmap(apply, in_axes=(None, 0, 0))(params, x, levels)
    single = jnp.stack([apply(params, a, b) for a, b in zip(x, levels, strict=True)])
    np.testing.assert_allclose(batched, single, rtol=1e-5, atol=1e-6)
    assert jnp.max(jnp.abs(batched)) > 0.01


def test_output_starts_at_zero_and_depends_on_everything():
    apply, params = nn.split(
        nn.ResidualMLP((4,), width=16, depth=1, num_frequencies=3, rngs=nnx.Rngs(0))
    )
    x, level = jnp.ones(4), jnp.asarray(0.3)
    np.testing.assert_array_equal(apply(params, x, level), 0)
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    by_x, by_level = jax.jacobian(lambda x, c: apply(params, x, c), argnums=(0, 1))(x, level)
    assert jnp.all(jnp.abs(by_x).sum(0) > 0)
    assert jnp.any(by_level != 0)


def test_splitting_equal_modules_does_not_compile_twice():
    traces = []

    @jax.jit
    def call(apply_is_static, params, x):
        traces.append(1)
        return apply_is_static(params, x)

    for seed in (0, 1):
        apply, params = nn.split(nnx.Linear(3, 3, rngs=nnx.Rngs(seed)))
        jax.jit(lambda p, x, apply=apply: call.__wrapped__(apply, p, x))(params, jnp.ones(3))
    first, _ = nn.split(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    second, _ = nn.split(nnx.Linear(3, 3, rngs=nnx.Rngs(7)))
    assert first == second
    assert hash(first) == hash(second)


def test_batched_modules_are_called_with_a_batch_of_one():
    norm = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (6, 5, 4)) * jnp.arange(1.0, 7)[:, None, None]
    apply, params = nn.split(norm, batched=True)
    np.testing.assert_allclose(apply(params, x), norm(x[None])[0], rtol=1e-6)
    # Without the batch axis, NNX takes the rows of the image for examples.
    wrong, params = nn.split(norm)
    assert jnp.max(jnp.abs(wrong(params, x) - norm(x[None])[0])) > 0.1


@pytest.mark.parametrize("size", [2, 8])
def test_embedding_separates_noise_levels(size):
    levels = jnp.linspace(-2, 1, 50)
    codes = jax.vmap(lambda c: nn.sinusoidal_embedding(c, size))(levels)
    assert codes.shape == (50, size)
    np.testing.assert_allclose(jnp.sum(codes**2, 1), size / 2, rtol=1e-5)


def test_gradient_mlp_is_the_gradient_of_a_scalar(x64):
    network = nn.GradientMLP((2, 3), width=16, depth=2, num_frequencies=3, rngs=nnx.Rngs(0))
    apply, params = nn.split(network)
    x, level = jax.random.normal(jax.random.key(0), (2, 3)), jnp.asarray(0.3)
    np.testing.assert_array_equal(apply(params, x, level), 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
    inner, _ = nn.split(
        nn.ResidualMLP((2, 3), width=16, depth=2, num_frequencies=3, rngs=nnx.Rngs(0))
    )
    expected = jax.grad(lambda y: jnp.sum(y * inner(params["inner"], y, level)))(x)
    np.testing.assert_allclose(apply(params, x, level), expected, rtol=1e-10)
    assert jnp.max(jnp.abs(expected)) > 0.01

    model = denoise.precondition(apply, params, sigma_data=0.7, shape=(2, 3))
    matrix = jax.jacobian(lambda y: model(y, 0.4))(x).reshape(6, 6)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert not np.allclose(matrix, np.diag(np.diag(matrix)))
