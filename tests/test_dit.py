"""The diffusion transformer: what it owes its paper, its conditions, and its numerical options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmh_jax import nn, train
from mmh_jax.nn.dit import positions
from mmh_jax.train.store import ModelConfig

SHAPE = (8, 4, 2)
SMALL = {"patch_size": 2, "width": 16, "depth": 2, "num_heads": 2}
C_NOISE = jnp.array(0.3)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(apply, params, *inputs, **options):
    return apply(params, *inputs, **options)


def dit(**options):
    return nn.DiT(SHAPE, **(SMALL | options), rngs=nnx.Rngs(0))


def split(**options):
    return nn.split(nnx.eval_shape(lambda: dit(**options)))


def perturbed(**options):
    """`(apply, params)` with parameters of ordinary size, none of them zero."""
    apply, params = split(**options)
    rng = np.random.default_rng(0)

    def fill(leaf):
        values = rng.normal(size=leaf.shape)
        values = 0.2 * values if values.ndim == 1 else values / leaf.shape[0] ** 0.5
        return jnp.asarray(values, leaf.dtype)

    return apply, jax.tree.map(fill, params)


CONDITIONS = {
    "none": ({}, None),
    "label": ({"num_classes": 3}, 1),
    "tokens": ({"token_size": 5, "num_tokens": 3}, draw(3, 5, seed=7)),
}


def test_positions_are_those_of_the_paper():
    found = positions(3, 5, 8)
    omega = np.array([1.0, 0.01])
    for row in range(3):
        for column in range(5):
            angles = column * omega, row * omega
            expected = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)])
            np.testing.assert_allclose(found[5 * row + column], expected, atol=1e-6)


def test_patches_and_back():
    network = dit()
    x = jnp.arange(64.0).reshape(SHAPE)
    patches = network._patches(x)
    np.testing.assert_array_equal(patches[3], x[2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(network._image(patches), x)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_starts_at_zero_and_every_parameter_learns(kind):
    options, cond = CONDITIONS[kind]
    start = run(*nn.split(dit(**options)), draw(*SHAPE), C_NOISE, cond)
    assert not jnp.any(start)
    apply, params = perturbed(**options)

    def loss(params):
        answers = (apply(params, draw(*SHAPE), C_NOISE, c) for c in (cond, None))
        return sum(jnp.sum(answer * draw(*SHAPE, seed=3)) for answer in answers)

    grads, _ = jax.tree.flatten_with_path(jax.jit(jax.grad(loss))(params))
    still = [jax.tree_util.keystr(path) for path, g in grads if not float(jnp.abs(g).max()) > 1e-8]
    assert still == []


def test_blocks_start_as_the_identity():
    apply, params = nn.split(dit())
    _, inside = nn.features(apply, params, draw(*SHAPE), C_NOISE)
    network = dit()
    entered = network.enter(network._patches(draw(*SHAPE))) + positions(4, 2, 16)
    np.testing.assert_allclose(inside.bottleneck.reshape(8, 16), entered, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_one_example_is_what_a_batch_gives(kind):
    options, cond = CONDITIONS[kind]
    apply, params = perturbed(**options)
    inputs = (draw(4, *SHAPE), jnp.linspace(-1.0, 1.0, 4))
    inputs += () if cond is None else (jnp.stack([jnp.asarray(cond)] * 4),)
    batched = jax.jit(jax.vmap(apply, (None, *[0] * len(inputs))))(params, *inputs)
    for i in range(4):
        one = run(apply, params, *(value[i] for value in inputs))
        np.testing.assert_allclose(one, batched[i], rtol=1e-5, atol=1e-5)


def test_derivative_is_that_of_finite_differences(x64):
    apply, params = perturbed(num_classes=3)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    x, direction = draw(*SHAPE).astype(float), draw(*SHAPE, seed=1).astype(float)

    @jax.jit
    def at(x):
        return apply(params, x, jnp.asarray(0.3, float), 1)

    tangent = jax.jvp(at, (x,), (direction,))[1]
    step = 1e-5
    differences = (at(x + step * direction) - at(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(tangent, differences, rtol=1e-6, atol=1e-7)


def test_half_precision_recomputation_and_dropout():
    apply, params = perturbed()
    x = draw(*SHAPE)
    answer = run(apply, params, x, C_NOISE)
    again = run(perturbed(remat=True)[0], params, x, C_NOISE)
    np.testing.assert_allclose(again, answer, rtol=1e-5, atol=1e-5)

    def gradient(apply):
        return jax.jit(jax.grad(lambda params: jnp.sum(apply(params, x, C_NOISE) ** 2)))(params)

    pairs = [jax.tree.leaves(gradient(perturbed(remat=remat)[0])) for remat in (False, True)]
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    half = run(perturbed(dtype="bfloat16")[0], params, x, C_NOISE)
    assert half.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(half - answer) / jnp.linalg.norm(answer) < 0.05
    dropping = perturbed(dropout=0.5)[0]
    np.testing.assert_allclose(run(dropping, params, x, C_NOISE), answer, rtol=1e-5, atol=1e-5)
    dropped = run(dropping, params, x, C_NOISE, key=jax.random.key(0))
    assert jnp.abs(dropped - answer).max() > 1e-3


@pytest.mark.parametrize("kind", ["label", "tokens"])
def test_conditions_matter_and_null_is_the_unconditional_model(kind):
    options, cond = CONDITIONS[kind]
    apply, params = perturbed(**options)
    x = draw(*SHAPE)
    unconditional = run(apply, params, x, C_NOISE)
    assert jnp.abs(run(apply, params, x, C_NOISE, cond) - unconditional).max() > 1e-3
    null = nn.null_condition(apply, params)
    np.testing.assert_allclose(
        run(apply, params, x, C_NOISE, null), unconditional, rtol=1e-5, atol=1e-6
    )


def test_cross_attention_is_read_out():
    options, cond = CONDITIONS["tokens"]
    apply, params = perturbed(**options)
    read = jax.jit(jax.vmap(lambda x: nn.features(apply, params, x, C_NOISE, cond)))
    _, inside = read(draw(3, *SHAPE))
    assert [m.shape for m in inside.cross_attention] == [(3, 2, 4, 2, 3)] * 2
    for weights in inside.cross_attention:
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert inside.bottleneck.shape == (3, 4, 2, 16)


def test_number_of_parameters():
    network = nnx.eval_shape(lambda: nn.DiT((28, 28, 1), rngs=nnx.Rngs(0)))
    _, params = nn.split(network)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 952_592


def test_on_disk_and_back(tmp_path):
    config = ModelConfig(
        network="DiT",
        network_options=SMALL | {"num_classes": 3, "dtype": "bfloat16"},
        shape=SHAPE,
        scale=2.0,
        sigma_data=1.0,
        sigma_min=0.01,
        sigma_max=10.0,
    )
    model = train.build(config, np.full(SHAPE, 0.5, np.float32), key=jax.random.key(1))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, model.inner.params)
    model = model.replace(inner=model.inner.replace(params=moved))
    train.save(tmp_path, config, model)
    found, answer = train.load(tmp_path), jax.jit(lambda model: model(draw(*SHAPE), 0.3))
    for cond in (1, None):
        np.testing.assert_array_equal(answer(found.condition(cond)), answer(model.condition(cond)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"patch_size": 3}, "does not divide"),
        ({"width": 10}, "multiple of 4"),
        ({"num_heads": 3}, "do not divide into heads"),
        ({"depth": 0}, "at least one layer"),
        ({"dtype": "int8"}, "no floating dtype"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        split(**options)
    with pytest.raises(ValueError, match="Did you mean"):
        dit()(draw(2, *SHAPE), C_NOISE)


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(kind, platform):
    pytest.importorskip("flatbuffers")
    from jax import export

    options, cond = CONDITIONS[kind]
    apply, params = split(**options, dtype="bfloat16", remat=True)

    def program(params, x, cond):
        def loss(params):
            found = jax.vmap(lambda x: apply(params, x, C_NOISE, cond))(x)
            return jnp.mean(found**2)

        forward = jax.jvp(lambda x: apply(params, x[0], C_NOISE, cond), (x,), (x,))
        return jax.value_and_grad(loss)(params), forward

    exported = export.export(jax.jit(program), platforms=[platform])(params, draw(2, *SHAPE), cond)
    assert exported.platforms == (platform,)


def test_a_grey_image_needs_no_axis_of_channels():
    with_axis = nn.DiT((8, 8, 1), patch_size=2, width=16, depth=1, rngs=nnx.Rngs(0))
    without = nn.DiT((8, 8), patch_size=2, width=16, depth=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 8, 1))
    apply, params = nn.split(with_axis)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    grey, _ = nn.split(without)
    found = grey(params, x[..., 0], 0.3)
    assert found.shape == (8, 8)
    np.testing.assert_array_equal(found, apply(params, x, 0.3)[..., 0])
