"""Convolutions against JAX's own: values, every derivative, and what they become under `vmap`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mmh_jax import nn
from mmh_jax.nn.conv import convolve
from mmh_jax.train.compiled import compiled


def reference(x, kernel, stride, padding=None):
    names = ("NHWC", "HWIO", "NHWC")
    pads = "SAME" if padding is None else padding
    pads = [(pads, pads)] * 2 if isinstance(pads, int) else pads
    return lax.conv_general_dilated(
        x[None], kernel, (stride, stride), pads, dimension_numbers=names
    )[0]


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


CASES = [  # height, width, kernel, stride, channels of the result, and padding if not 'SAME'
    (6, 6, 3, 1, 3),
    (6, 8, 3, 1, 1),
    (7, 6, (5, 1), 1, 1),
    (6, 8, 3, 2, 3),
    (7, 5, 3, 2, 1),
    (7, 6, 1, 2, 3),
    (9, 8, 5, 2, 3),
    (7, 8, 3, 3, 3),
    (8, 6, 3, 2, 3, 1),
    (6, 7, 3, 2, 1, ((0, 1), (0, 1))),
    (6, 5, 3, 1, 1, 2),
    (5, 6, 1, 2, 1, 1),
    (7, 6, 4, 1, 3, 0),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_jax_in_value_and_derivatives(case, x64):
    height, width, size, stride, num_out, *rest = case
    padding = rest[0] if rest else None
    size = (size, size) if isinstance(size, int) else size
    x, kernel, dx, dkernel = draw(*2 * ((height, width, 2), (*size, 2, num_out)))
    (y,) = draw(reference(x, kernel, stride, padding).shape)

    def everything(conv, x, kernel):
        value, tangent = jax.jvp(conv, (x, kernel), (dx, dkernel))
        only_x = jax.jvp(lambda x: conv(x, kernel), (x,), (dx,))[1]
        adjoints = jax.vjp(conv, x, kernel)[1](y)

        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(jnp.tanh(x), kernel)) * y)

        grad = jax.grad(loss, (0, 1))
        second = jax.jvp(grad, (x, kernel), (dx, dkernel))[1]
        reverse_twice = jax.grad(lambda *a: sum(jnp.sum(g**2) for g in grad(*a)), (0, 1))(x, kernel)
        return value, tangent, only_x, adjoints, second, reverse_twice

    ours = functools.partial(
        everything, functools.partial(convolve, stride=stride, padding=padding)
    )
    theirs = functools.partial(everything, lambda x, k: reference(x, k, stride, padding))
    found, expected = jax.jit(ours)(x, kernel), jax.jit(theirs)(x, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * float(jnp.abs(b).max()))


def test_eager_is_jitted(x64):
    x, kernel = draw((5, 5, 2), (3, 3, 2, 3))
    np.testing.assert_allclose(convolve(x, kernel), reference(x, kernel, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_over_either_or_both(axes, stride, x64):
    x, kernel = draw((6, 6, 2), (3, 3, 2, 3))

    def three(array, axis):
        return array if axis is None else jnp.stack([array, 2 * array[::-1], array**2], axis)

    x, kernel = three(x, axes[0]), three(kernel, axes[1])

    def everything(conv, x, kernel):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel)))

        per_example = jax.vmap(jax.value_and_grad(loss, (0, 1)), axes)(x, kernel)

        def total(x, kernel):
            return jnp.sum(jax.vmap(loss, axes)(x, kernel) ** 2)

        return per_example, jax.grad(total, (0, 1))(x, kernel)

    ours = functools.partial(everything, functools.partial(convolve, stride=stride))
    theirs = functools.partial(everything, lambda x, kernel: reference(x, kernel, stride))
    found, expected = jax.jit(ours)(x, kernel), jax.jit(theirs)(x, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * float(jnp.abs(b).max()))


def operations(jaxpr):
    """Names of all operations and the shapes of their results, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, [v.aval.shape for v in eqn.outvars]
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from operations(inner.jaxpr)


def test_the_gradient_of_a_batch_is_one_operation():
    x, kernel = jnp.ones((16, 8, 8, 2)), jnp.ones((3, 3, 2, 4))

    def loss(kernel):
        return jnp.mean(jax.vmap(lambda x: jnp.sum(convolve(x, kernel) ** 2))(x))

    found = list(operations(jax.make_jaxpr(jax.value_and_grad(loss))(kernel).jaxpr))
    adjoints = [shapes for name, shapes in found if name == "convolve_to_kernel"]
    assert adjoints == [[kernel.shape]]
    assert not any(shape == (16, *kernel.shape) for _, shapes in found for shape in shapes)
    # When only x moves, nothing is computed for the kernel.
    moved = jax.make_jaxpr(lambda x: jax.jvp(lambda x: convolve(x, kernel), (x,), (x,)))(x[0])
    assert [name for name, _ in operations(moved.jaxpr)].count("convolve") == 2


@pytest.mark.parametrize("stride", [1, 2])
def test_every_derivative_has_the_fast_order_inside_a_loop(stride):
    """In other orders XLA's CPU backend falls back to plain loops; see the module."""
    if jax.default_backend() != "cpu":
        pytest.skip("about the CPU backend")
    x, kernel = jnp.ones((4, 8, 8, 3)), jnp.ones((3, 3, 3, 3))

    def loss(x, kernel):
        conv = functools.partial(convolve, stride=stride)
        return jnp.sum(jnp.sin(jax.vmap(conv, (0, None))(x, kernel)))

    def step(carry, _):
        grads = jax.grad(loss, (0, 1))(*carry)
        return jax.tree.map(lambda p, g: p - g, carry, grads), None

    program = jax.jit(lambda *carry: lax.scan(step, carry, length=3)[0])
    text = program.lower(x, kernel).compile().as_text()
    orders = [
        line.split("dim_labels=")[1].split(",")[0].split()[0]
        for line in text.splitlines()
        if " convolution(" in line
    ]
    assert len(orders) == 3
    assert set(orders) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("num_out", [32, 64])
def test_options_keep_convolutions_in_xla(num_out):
    """Of the sizes that XLA gives to a library, which is slow for the kernel's gradient."""
    if jax.default_backend() != "cpu":
        pytest.skip("about the CPU backend")
    x, kernel = jnp.ones((16, 28, 28, 48)), jnp.ones((3, 3, 48, num_out))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(jax.vmap(convolve, (0, None))(x, kernel)))

    program = jax.jit(jax.grad(loss, (0, 1)), compiler_options=nn.compiler_options())
    text = program.lower(x, kernel).compile().as_text()
    assert text.count(" convolution(") == 3
    assert text.index(" convolution(") > text.index("\nENTRY")  # in no fusion of a library


def test_training_is_compiled_with_these_options(monkeypatch):
    expected = nn.compiler_options()  # compiles, to see whether XLA knows them: before the patch
    seen = []
    monkeypatch.setattr(jax, "jit", lambda f, **options: seen.append(options) or f)
    assert compiled(static_argnames="n")(lambda x, n: x + n)(1, n=2) == 3
    assert seen == [{"compiler_options": expected, "static_argnames": "n"}]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    pytest.importorskip("flatbuffers")
    from jax import export

    def loss(kernel, x):
        return jnp.sum(jnp.sin(jax.vmap(lambda x: convolve(x, kernel, stride=2))(x)))

    def program(kernel, x):
        grad = jax.grad(loss, (0, 1))
        return jax.jvp(grad, (kernel, x), (kernel, x))

    exported = export.export(jax.jit(program), platforms=[platform])
    text = exported(jnp.ones((3, 3, 2, 4)), jnp.ones((5, 8, 8, 2))).mlir_module()
    assert "stablehlo.convolution" in text
    assert "f, 0, 1, b]x[i, 0, 1, o]" in text  # JAX's own adjoint, not the order for CPU


def test_devices_that_share_a_batch():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; XLA_FLAGS was set to fewer")
    mesh = jax.make_mesh((8,), ("examples",), axis_types=(jax.sharding.AxisType.Auto,))
    x, kernel = (a.astype(jnp.float32) for a in draw((16, 6, 6, 2), (3, 3, 2, 3)))
    spec = jax.sharding.PartitionSpec("examples")

    def loss(kernel, x):
        return jnp.sum(jax.vmap(lambda x: convolve(x, kernel))(x) ** 2)

    def spread(kernel, x):
        return jax.shard_map(
            lambda kernel, x: jax.lax.psum(loss(kernel, x), "examples"),
            mesh=mesh,
            in_specs=(jax.sharding.PartitionSpec(), spec),
            out_specs=jax.sharding.PartitionSpec(),
        )(kernel, x)

    one, eight = (jax.jit(jax.grad(f, (0, 1)))(kernel, x) for f in (loss, spread))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_layer_has_a_bias_and_a_compute_dtype():
    conv = nn.Conv(2, 3, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(3.0)
    (x,) = draw((6, 6, 2))
    x = x.astype(jnp.float32)
    expected = reference(x, conv.kernel[...], 1) + jnp.arange(3.0)
    np.testing.assert_allclose(conv(x), expected, rtol=1e-5, atol=1e-5)
    half = nn.Conv(2, 3, dtype="bfloat16", rngs=nnx.Rngs(0))
    half.bias[...] = jnp.arange(3.0)
    assert half(x).dtype == jnp.bfloat16
    assert half.kernel[...].dtype == jnp.float32
    np.testing.assert_allclose(half(x).astype(jnp.float32), expected, atol=0.05)
    assert not jnp.any(nn.Conv(2, 3, zero=True, rngs=nnx.Rngs(0))(x))
    scale = jnp.std(nn.Conv(64, 64, rngs=nnx.Rngs(0)).kernel[...])
    np.testing.assert_allclose(scale, (9 * 64) ** -0.5, rtol=0.02)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: convolve(jnp.ones((2, 4, 4, 1)), jnp.ones((3, 3, 1, 1))), "jax.vmap"),
        (lambda: convolve(jnp.ones((4, 4, 2)), jnp.ones((3, 3, 1, 1))), "kernel"),
        (lambda: convolve(jnp.ones((4, 4, 1)), jnp.ones((3, 3, 1, 1)), stride=0), "stride=0"),
        (lambda: convolve(jnp.ones((4, 4, 1)), jnp.ones((3, 3, 1, 1)), padding=-1), "padding=-1"),
        (lambda: convolve(jnp.ones((2, 4, 1)), jnp.ones((3, 3, 1, 1)), padding=0), "hold a kernel"),
        (lambda: nn.Conv(1, 1, size=2, rngs=nnx.Rngs(0)), "odd"),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call()
