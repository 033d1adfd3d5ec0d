"""The U-Net, its layers and its conditions, against closed forms and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmh_jax import denoise, nn, train
from mmh_jax.train.store import ModelConfig

SHAPE = (8, 8, 2)
SMALL = {"width": 8, "multipliers": [1, 2], "attention_resolutions": [4]}
C_NOISE = jnp.array(0.3)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(apply, params, *inputs, **options):
    return apply(params, *inputs, **options)


def abstract(**options):
    """A network without arrays."""
    return nnx.eval_shape(lambda: unet(**options))


def perturbed(module):
    """`(apply, params)` with parameters of ordinary size, none of them zero."""
    apply, params = nn.split(module)
    rng = np.random.default_rng(0)

    def fill(leaf):
        values = rng.normal(size=leaf.shape)
        values = 0.5 + 0.2 * values if values.ndim == 1 else values / leaf.size**0.5 * 2
        return jnp.asarray(values, leaf.dtype)

    return apply, jax.tree.map(fill, params)


def unet(**options):
    return nn.UNet(SHAPE, **(SMALL | options), rngs=nnx.Rngs(0))


CONDITIONS = {
    "none": ({}, None),
    "label": ({"num_classes": 3}, 1),
    "tokens": ({"token_size": 5, "num_tokens": 3}, draw(3, 5, seed=7)),
}


# Layers


def test_group_norm_is_torch_s():
    torch = pytest.importorskip("torch")
    x, scale, bias = draw(5, 6, 24) * 3 + 1, draw(24), draw(24, seed=1)
    norm = nn.GroupNorm(24)
    norm.scale[...], norm.bias[...] = scale, bias
    image, scale, bias = (torch.tensor(np.asarray(a)) for a in (x, scale, bias))
    expected = torch.nn.functional.group_norm(
        image.permute(2, 0, 1)[None], norm.num_groups, scale, bias, 1e-5
    )
    np.testing.assert_allclose(norm(x), expected[0].permute(1, 2, 0), rtol=1e-4, atol=1e-5)


def test_group_norm_by_hand():
    # Two groups of four channels: the first constant, the second of mean 10 and variance 4.
    x = jnp.concatenate([jnp.full((1, 2, 4), 3.0), jnp.array([8.0, 12.0] * 4).reshape(1, 2, 4)], -1)
    found = nn.GroupNorm(8, eps=0.0)(x.at[0, 0, 0].add(0.0))
    np.testing.assert_allclose(found[..., 4:].reshape(-1), [-1.0, 1.0] * 4, rtol=1e-6)
    assert jnp.all(jnp.isnan(found[..., :4]))  # 0 / 0: no variance, no eps
    np.testing.assert_allclose(nn.GroupNorm(8)(x)[..., :4], 0.0)


@pytest.mark.parametrize(
    ("width", "groups"),
    [(128, 32), (256, 32), (96, 24), (36, 9), (20, 5), (7, 1), (3, 1), (44, 11)],
)
def test_groups_divide_and_have_four_channels(width, groups):
    assert nn.GroupNorm(width).num_groups == groups


def test_attention_is_torch_s():
    torch = pytest.importorskip("torch")
    attend = nn.Attention(12, 3, context_size=5, rngs=nnx.Rngs(0))
    attend.leave.kernel[...] = draw(12, 12)
    h, context = draw(7, 12, seed=1), draw(4, 5, seed=2)
    answer, weights = attend(h, context)
    q = attend.query(h)
    k, v = jnp.split(attend.key_value(context), 2, -1)
    q, k, v = (torch.tensor(np.asarray(a)).reshape(len(a), 3, 4).transpose(0, 1) for a in (q, k, v))
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = np.asarray(heads.transpose(0, 1).reshape(7, 12)) @ np.asarray(draw(12, 12))
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_attention_to_equal_keys_is_the_mean():
    attend = nn.Attention(4, 2, rngs=nnx.Rngs(0))
    attend.query.kernel[...] = jnp.zeros((4, 4))
    values = jnp.eye(4)
    attend.key_value.kernel[...] = jnp.concatenate([draw(4, 4), values], 1)
    attend.leave.kernel[...] = jnp.eye(4)
    h = draw(6, 4)
    np.testing.assert_allclose(attend(h)[0], jnp.tile(h.mean(0), (6, 1)), rtol=1e-5, atol=1e-6)


# The network


@pytest.mark.parametrize("kind", CONDITIONS)
def test_one_example_is_what_a_batch_gives(kind):
    options, cond = CONDITIONS[kind]
    apply, params = perturbed(abstract(**options))
    x = draw(4, *SHAPE)
    inputs = (x, jnp.linspace(-1.0, 1.0, 4))
    inputs += () if cond is None else (jnp.stack([jnp.asarray(cond)] * 4),)
    batched = jax.jit(jax.vmap(apply, (None, *[0] * len(inputs))))(params, *inputs)
    for i in range(4):
        one = run(apply, params, *(value[i] for value in inputs))
        np.testing.assert_allclose(one, batched[i], rtol=1e-5, atol=1e-5)


@pytest.mark.spread(3)
@pytest.mark.parametrize("kind", CONDITIONS)
def test_starts_at_zero_and_every_parameter_learns(kind):
    options, cond = CONDITIONS[kind]
    start = run(*nn.split(unet(**options)), draw(*SHAPE), C_NOISE, cond)
    assert not jnp.any(start)
    apply, params = perturbed(abstract(**options))

    def loss(params):
        # The null condition as well, for its own parameters.
        answers = (run(apply, params, draw(*SHAPE), C_NOISE, c) for c in (cond, None))
        return sum(jnp.sum(answer * draw(*SHAPE, seed=3)) for answer in answers)

    grads, _ = jax.tree.flatten_with_path(jax.jit(jax.grad(loss))(params))
    still = [jax.tree_util.keystr(path) for path, g in grads if not float(jnp.abs(g).max()) > 1e-8]
    assert still == []


def test_derivative_is_that_of_finite_differences(x64):
    apply, params = perturbed(abstract(num_classes=3))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    x, direction = draw(*SHAPE).astype(float), draw(*SHAPE, seed=1).astype(float)

    @jax.jit
    def at(x):
        return run(apply, params, x, jnp.asarray(0.3, float), 1)

    tangent = jax.jvp(at, (x,), (direction,))[1]
    step = 1e-5
    differences = (at(x + step * direction) - at(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(tangent, differences, rtol=1e-7, atol=1e-8)
    back = jax.vjp(at, x)[1](tangent)[0]
    np.testing.assert_allclose(jnp.vdot(back, direction), jnp.vdot(tangent, tangent), rtol=1e-10)


def test_half_precision_and_recomputation():
    options, cond = CONDITIONS["tokens"]
    options = options | {"multipliers": [1], "attention_resolutions": [8]}
    _, params = perturbed(abstract(**options))
    x = draw(*SHAPE)

    def run_with(**changed):
        apply, _ = nn.split(abstract(**options, **changed))

        def loss(params):
            answer = run(apply, params, x, C_NOISE, cond)
            return jnp.sum(answer * draw(*SHAPE, seed=3)), answer

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    grads, answer = run_with()
    again, same = run_with(remat=True)
    np.testing.assert_allclose(same, answer, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    half_grads, half = run_with(dtype="bfloat16")
    assert half.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(half_grads)} == {jnp.dtype("float32")}
    error = jnp.linalg.norm(half - answer) / jnp.linalg.norm(answer)
    assert 0 < error < 0.05


def test_remat_is_in_the_program():
    def primitives(**options):
        apply, params = nn.split(abstract(**options))
        return str(jax.make_jaxpr(apply)(params, draw(*SHAPE), C_NOISE))

    assert "checkpoint" in primitives(remat=True) or "remat" in primitives(remat=True)
    assert "remat" not in primitives()


def test_dropout_only_with_a_key():
    apply, params = perturbed(abstract(dropout=0.5))
    x = draw(*SHAPE)
    one, two = (run(apply, params, x, C_NOISE, key=jax.random.key(seed)) for seed in (0, 1))
    assert jnp.abs(one - two).max() > 1e-3
    plain, _ = nn.split(abstract())
    np.testing.assert_array_equal(run(apply, params, x, C_NOISE), run(plain, params, x, C_NOISE))


def test_on_28_pixels_with_three_levels():
    network = nnx.eval_shape(lambda: nn.UNet((28, 28, 1), rngs=nnx.Rngs(0)))
    apply, params = perturbed(network)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_212_097
    answer, inside = jax.jit(nn.features, static_argnums=0)(apply, params, draw(28, 28, 1), C_NOISE)
    assert answer.shape == (28, 28, 1)
    assert inside.bottleneck.shape == (7, 7, 64)
    assert jnp.abs(answer).max() > 0.01


def test_oblong_images():
    network = nnx.eval_shape(
        lambda: nn.UNet((8, 4, 1), width=8, multipliers=(1, 2), rngs=nnx.Rngs(0))
    )
    apply, params = perturbed(network)
    assert run(apply, params, draw(8, 4, 1), C_NOISE).shape == (8, 4, 1)


# Conditions


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", ["label", "tokens"])
def test_conditions_matter_and_null_is_the_unconditional_model(kind):
    options, cond = CONDITIONS[kind]
    apply, params = perturbed(abstract(**options))
    x = draw(*SHAPE)
    null = nn.null_condition(apply, params)
    unconditional = run(apply, params, x, C_NOISE)
    assert jnp.abs(run(apply, params, x, C_NOISE, cond) - unconditional).max() > 1e-3
    np.testing.assert_array_equal(run(apply, params, x, C_NOISE, None), unconditional)
    np.testing.assert_allclose(run(apply, params, x, C_NOISE, null), unconditional, rtol=1e-6)

    model = denoise.precondition(apply, params, sigma_data=1.0, shape=SHAPE)
    denoised = jax.jit(lambda model: model(x, 0.5))
    np.testing.assert_allclose(model.condition(null)(x, 0.5), model(x, 0.5), rtol=1e-5, atol=1e-6)
    guided = denoise.Guided(model.condition(cond), model.condition(None), 2.0)
    expected = 2.0 * denoised(model.condition(cond)) - denoised(model)
    np.testing.assert_allclose(denoised(guided), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_is_read_out():
    options, cond = CONDITIONS["tokens"]
    apply, params = perturbed(abstract(**options, num_heads=2))
    x = draw(3, *SHAPE)
    read = jax.jit(jax.vmap(lambda x: nn.features(apply, params, x, C_NOISE, cond)))
    answer, inside = read(x)
    np.testing.assert_allclose(
        answer[1], run(apply, params, x[1], C_NOISE, cond), rtol=1e-4, atol=1e-5
    )
    # Blocks on 4 pixels: one down, two in the middle, two up.
    assert [m.shape for m in inside.cross_attention] == [(3, 2, 4, 4, 3)] * 5
    for weights in inside.cross_attention:
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
        assert weights.std() > 1e-3
    assert inside.bottleneck.shape == (3, 4, 4, 16)
    with pytest.raises(TypeError, match="shows no features"):
        nn.features(*nn.split(nn.ResidualMLP((2,), rngs=nnx.Rngs(0))), jnp.ones(2), C_NOISE)


def test_other_numbers_of_tokens_and_their_order():
    options, cond = CONDITIONS["tokens"]
    apply, params = perturbed(abstract(**options))
    x = draw(*SHAPE)
    answer = run(apply, params, x, C_NOISE, cond)
    # Attention does not know an order, and a token twice everywhere is the same law.
    np.testing.assert_allclose(
        run(apply, params, x, C_NOISE, cond[::-1]), answer, rtol=1e-4, atol=1e-5
    )
    twice = run(apply, params, x, C_NOISE, jnp.concatenate([cond, cond]))
    np.testing.assert_allclose(twice, answer, rtol=1e-4, atol=1e-5)


def test_dropped_conditions():
    keys = jax.random.split(jax.random.key(0), 4000)
    labels = jax.vmap(lambda key: nn.drop_condition(2, 0.25, key=key, null=3))(keys)
    assert set(labels.tolist()) == {2, 3}
    assert abs(float(jnp.mean(labels == 3)) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    tokens = jax.vmap(
        lambda key: nn.drop_condition(jnp.ones((3, 5)), 0.5, key=key, null=jnp.zeros((3, 5)))
    )(keys[:50])
    assert set(tokens.sum((1, 2)).tolist()) == {0.0, 15.0}  # all of it or nothing

    # The learned tokens are reached by the gradient.
    apply, params = perturbed(abstract(**CONDITIONS["tokens"][0]))

    def loss(params):
        null = nn.null_condition(apply, params)
        cond = nn.drop_condition(jnp.ones((3, 5)), 1.0, key=keys[0], null=null)
        return jnp.sum(run(apply, params, draw(*SHAPE), C_NOISE, cond))

    assert jnp.abs(jax.grad(loss)(params)["conditioning"]["null_tokens"][...]).max() > 1e-5


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", CONDITIONS)
def test_on_disk_and_back(kind, tmp_path):
    options, cond = CONDITIONS[kind]
    config = ModelConfig(
        network="UNet",
        network_options=SMALL | {"dtype": "bfloat16", "remat": True} | options,
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
    found = train.load(tmp_path)
    x = draw(*SHAPE)
    answer = jax.jit(lambda model: model(x, 0.3))
    for c in (cond, None):
        np.testing.assert_array_equal(answer(found.condition(c)), answer(model.condition(c)))
    assert found.inner.apply == model.inner.apply  # compiled once
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"bfloat16"', '"int8"')
    )
    with pytest.raises(ValueError, match="does not describe a model"):
        train.load(tmp_path)


def test_labels_out_of_range():
    apply, params = perturbed(abstract(num_classes=3))
    x = draw(*SHAPE)
    with pytest.raises(ValueError, match=r"no label.*0 to 2, and 3"):
        apply(params, x, C_NOISE, 4)
    with pytest.raises(ValueError, match="no label"):
        apply(params, x, C_NOISE, -1)
    # What cannot be looked at is not another label's answer.
    found = jax.vmap(lambda label: run(apply, params, x, C_NOISE, label))(jnp.array([-1, 0, 3, 4]))
    assert jnp.isnan(found).all((1, 2, 3)).tolist() == [True, False, False, True]
    assert jnp.isnan(found).any((1, 2, 3)).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"multipliers": (1, 1, 1, 1, 1)}, "cannot be halved 4 times.*at most 4"),
        ({"attention_resolutions": (5,)}, r"no feature map of size \[5\].*\[8, 4\]"),
        ({"attention_resolutions": (), "token_size": 4}, "could not see its tokens"),
        ({"num_classes": 3, "token_size": 4}, "labels or on tokens"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_heads": 3}, "do not divide into heads"),
        ({"num_heads": 2, "head_size": 4}, "give one"),
        ({"head_size": 5}, "do not divide into heads"),
        ({"dtype": "int8"}, "no floating dtype"),
        ({"dtype": "float17"}, "no floating dtype"),
        ({"dropout": 1.0}, "dropout"),
        ({"width": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        nnx.eval_shape(lambda: unet(**options))


def test_inputs_that_cannot_be():
    plain, labelled, told = (unet(width=4, **options) for options, _ in CONDITIONS.values())
    x = draw(*SHAPE)
    for network, inputs, error, match in [
        (plain, (x[None], C_NOISE), ValueError, "jax.vmap"),
        (plain, (x[:4], C_NOISE), ValueError, r"takes \(8, 8, 2\)"),
        (plain, (x, C_NOISE, 1), ValueError, "without conditions"),
        (labelled, (x, C_NOISE, 0.5), TypeError, "integer"),
        (labelled, (x, C_NOISE, jnp.array([1])), ValueError, "jax.vmap"),
        (told, (x, C_NOISE, 1), ValueError, r"tokens \(L, 5\)"),
        (told, (x, C_NOISE, jnp.ones((2, 3, 5))), ValueError, "jax.vmap"),
        (told, (x, C_NOISE, jnp.ones((3, 5), int)), TypeError, "real numbers"),
    ]:
        with pytest.raises(error, match=match):
            network(*inputs)
    with pytest.raises(ValueError, match="without conditions"):
        nn.null_condition(*nn.split(plain))
    with pytest.raises(ValueError, match="between 0 and 1"):
        nn.drop_condition(1, 1.5, key=jax.random.key(0), null=3)
    with pytest.raises(ValueError, match="stand for the other"):
        nn.drop_condition(jnp.ones(4, int), 0.5, key=jax.random.key(0), null=3)


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(kind, platform):
    pytest.importorskip("flatbuffers")
    from jax import export

    options, cond = CONDITIONS[kind]
    apply, params = nn.split(abstract(**options, dtype="bfloat16", remat=True))

    def loss(params, x, cond):
        found = jax.vmap(lambda x: run(apply, params, x, C_NOISE, cond))(x)
        return jnp.mean(found**2)

    def program(params, x, cond):
        forward = jax.jvp(lambda x: run(apply, params, x[0], C_NOISE, cond), (x,), (x,))
        return jax.value_and_grad(loss)(params, x, cond), forward

    exported = export.export(jax.jit(program), platforms=[platform])(params, draw(2, *SHAPE), cond)
    assert exported.platforms == (platform,)


def test_training_learns_two_images():
    network = nn.UNet((4, 4, 1), width=8, multipliers=(1,), rngs=nnx.Rngs(0))
    apply, params = nn.split(network)
    model = denoise.precondition(apply, params, sigma_data=1.0, shape=(4, 4, 1))
    pattern = np.sign(draw(4, 4, 1))
    points = np.stack([pattern, -pattern] * 16)
    config = train.TrainConfig(num_steps=200, batch_size=32, steps_per_round=20, learning_rate=5e-3)
    rounds = train.fit(model, points, config, key=jax.random.key(0))
    losses = [metrics.loss for metrics in rounds]
    assert losses[-1] < 0.6 * losses[0], losses


def test_a_grey_image_needs_no_axis_of_channels():
    with_axis = nn.UNet((8, 8, 1), width=8, multipliers=(1, 2), rngs=nnx.Rngs(0))
    without = nn.UNet((8, 8), width=8, multipliers=(1, 2), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 8, 1))
    apply, params = nn.split(with_axis)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    grey, _ = nn.split(without)
    found = grey(params, x[..., 0], 0.3)
    assert found.shape == (8, 8)
    np.testing.assert_array_equal(found, apply(params, x, 0.3)[..., 0])
