r"""A convolution of one image, and its two adjoints, as three operations closed under derivatives.

    y[h, w, o] = sum_{i, j, c}  x[s h + i - p, s w + j - p, c]  k[i, j, c, o]

with zeros outside x and stride s; with 'SAME' padding, the default, y has ceil(size / s) rows.  The
map is linear in x and in k.  `apply(x, k)`, `to_input(y, k)` (its adjoint in x) and
`to_kernel(x, y)` (its adjoint in k) are bilinear, and the adjoint of any of them in any argument is
another one: so forward mode, reverse mode and every mixture of both need nothing else.

Why not `jax.lax.conv_general_dilated` alone: the convolutions that are its adjoints name their axes
in other orders, which XLA's CPU backend brings into the one order that its fast routine knows only
at the top level of a program.  Inside a `scan` or `map`, as in training, they are plain loops, 30
to 300 times slower.  Here they are written in the fast order on CPU; elsewhere they are JAX's own.

Under `vmap` with a shared kernel each of the three is one convolution, also the gradient with
respect to the kernel: no gradients of single examples are formed.

From JAX 0.10 on XLA gives convolutions on CPU to a library, YNNPACK, whose time for a kernel as
large as the image, which is what `to_kernel` is, grows out of all proportion: some ten times that
of XLA's own routine.  `compiler_options()` keeps it for matrix products and sums alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mmh_jax.typing import Array

__all__ = ["Conv", "compiler_options", "convolve"]

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Window:
    """What is static in a convolution: sizes of its input and kernel, stride, zeros around x."""

    size: Pair
    kernel: Pair
    stride: int
    padding: tuple[Pair, Pair]
    precision: Any

    @property
    def output(self) -> Pair:
        height, width = (
            (size + low + high - k) // self.stride + 1
            for size, k, (low, high) in zip(self.size, self.kernel, self.padding, strict=True)
        )
        return height, width


def _conv(
    lhs: Array, rhs: Array, window: _Window, padding: Sequence[Pair], **options: Any
) -> Array:
    """The one order of axes, (N, H, W, C) with (h, w, C, O), that is fast everywhere."""
    strides = options.pop("strides", (1, 1))
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        lhs, rhs, strides, padding, dimension_numbers=names, precision=window.precision, **options
    )


def _apply(x: Array, kernel: Array, window: _Window) -> Array:
    return _conv(x, kernel, window, window.padding, strides=(window.stride,) * 2)


def _to_input(y: Array, kernel: Array, window: _Window) -> Array:
    """Every value of y, spread over the inputs it came from: a convolution by the turned kernel."""
    padding = []
    for size, k, out, (low, _) in zip(
        window.size, window.kernel, window.output, window.padding, strict=True
    ):
        spread = (out - 1) * window.stride + 1
        padding.append((k - 1 - low, size + low - spread))
    turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return _conv(y, turned, window, padding, lhs_dilation=(window.stride,) * 2)


def _to_kernel(x: Array, y: Array, window: _Window) -> Array:
    """One slides over the other: a convolution with channels for examples, examples for channels.

    The one with fewer channels slides, since all its positions under the kernel are written out.
    """
    if window.stride == 1 and y.shape[3] < x.shape[3]:
        padding = [
            (k - 1 - low, k - 1 - high)
            for k, (low, high) in zip(window.kernel, window.padding, strict=True)
        ]
        turned = _conv(y.transpose(3, 1, 2, 0), x.transpose(1, 2, 0, 3), window, padding)
        return jnp.flip(turned, (1, 2)).transpose(1, 2, 3, 0)
    padding = []
    for size, k, out, (low, _) in zip(
        window.size, window.kernel, window.output, window.padding, strict=True
    ):
        spread = (out - 1) * window.stride + 1
        padding.append((low, k - 1 + spread - size - low))
    found = _conv(
        x.transpose(3, 1, 2, 0),
        y.transpose(1, 2, 0, 3),
        window,
        padding,
        rhs_dilation=(window.stride,) * 2,
    )
    return found.transpose(1, 2, 0, 3)


def _to_input_by_jax(y: Array, kernel: Array, window: _Window) -> Array:
    shape = jax.ShapeDtypeStruct((y.shape[0], *window.size, kernel.shape[2]), y.dtype)
    return jax.linear_transpose(lambda x: _apply(x, kernel, window), shape)(y)[0]


def _to_kernel_by_jax(x: Array, y: Array, window: _Window) -> Array:
    shape = jax.ShapeDtypeStruct((*window.kernel, x.shape[3], y.shape[3]), x.dtype)
    return jax.linear_transpose(lambda kernel: _apply(x, kernel, window), shape)(y)[0]


Rule = Callable[..., Array]


def _operation(name: str, on_cpu: Rule, elsewhere: Rule, folds: tuple[Pair, Pair]) -> Primitive:
    """A bilinear operation; what its adjoints are is said below, once all three are there.

    Args:
        name: what it is called in a jaxpr.
        on_cpu: the computation in the order that is fast there.
        elsewhere: the computation as JAX would do it.
        folds: for each argument, an axis of it over which the operation works independently, and
            the axis of the result where that one comes out.  A batch of one argument is folded
            into it.
    """
    operation = Primitive(name)

    @functools.partial(jax.jit, static_argnames="window")
    def evaluate(a: Array, b: Array, *, window: _Window) -> Array:
        return operation.bind(a, b, window=window)

    def abstract(a: Any, b: Any, *, window: _Window) -> Any:
        found = jax.eval_shape(
            functools.partial(on_cpu, window=window), *(_plain(value) for value in (a, b))
        )
        return a.update(shape=found.shape, dtype=found.dtype, weak_type=False)

    def batch(args: Any, dims: Any, *, window: _Window) -> tuple[Array, int]:
        if None not in dims:
            return jax.vmap(functools.partial(elsewhere, window=window), dims)(*args), 0
        which = 0 if dims[1] is None else 1
        axis, result_axis = folds[which]
        moved = jnp.moveaxis(args[which], dims[which], axis)
        shape = moved.shape
        folded = moved.reshape(*shape[:axis], -1, *shape[axis + 2 :])
        args = (folded, args[1]) if which == 0 else (args[0], folded)
        found = operation.bind(*args, window=window)
        unfolded = (*found.shape[:result_axis], shape[axis], -1, *found.shape[result_axis + 1 :])
        return found.reshape(unfolded), result_axis

    operation.def_impl(evaluate)
    operation.def_abstract_eval(abstract)
    batching.primitive_batchers[operation] = batch
    mlir.register_lowering(operation, mlir.lower_fun(elsewhere, multiple_results=False))
    mlir.register_lowering(operation, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return operation


def _plain(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


_APPLY = _operation("convolve", _apply, _apply, ((0, 0), (3, 3)))
_TO_INPUT = _operation("convolve_to_input", _to_input, _to_input_by_jax, ((0, 0), (2, 3)))
_TO_KERNEL = _operation("convolve_to_kernel", _to_kernel, _to_kernel_by_jax, ((3, 2), (3, 3)))

ad.defbilinear(
    _APPLY,
    lambda y, x, kernel, window: _TO_INPUT.bind(y, kernel, window=window),
    lambda y, x, kernel, window: _TO_KERNEL.bind(x, y, window=window),
)
ad.defbilinear(
    _TO_INPUT,
    lambda x, y, kernel, window: _APPLY.bind(x, kernel, window=window),
    lambda x, y, kernel, window: _TO_KERNEL.bind(x, y, window=window),
)
ad.defbilinear(
    _TO_KERNEL,
    lambda kernel, x, y, window: _TO_INPUT.bind(y, kernel, window=window),
    lambda kernel, x, y, window: _APPLY.bind(x, kernel, window=window),
)


def _pads(
    size: Pair, kernel: Pair, stride: int, padding: int | Sequence[Pair] | None
) -> tuple[Pair, Pair]:
    if padding is None:
        same = lax.padtype_to_pads(size, kernel, (stride, stride), "SAME")
        (top, bottom), (left, right) = same
    else:
        (top, bottom), (left, right) = (
            ((padding, padding),) * 2 if isinstance(padding, int) else padding
        )
    found = (int(top), int(bottom)), (int(left), int(right))
    fits = all(
        low >= 0 and high >= 0 and extent + low + high >= k
        for extent, k, (low, high) in zip(size, kernel, found, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`convolve(padding={padding})` must not be negative, and an image of {size} pixels "
            f"with it must hold a kernel of {kernel}."
        )
    return found


def convolve(
    x: Array, kernel: Array, *, stride: int = 1, padding: int | Sequence[Pair] | None = None
) -> Array:
    """The convolution of one image with zeros around it, fast on CPU in every derivative.

    The same function as `jax.lax.conv_general_dilated`, and as often differentiable, in both modes.
    Per-example kernels (`vmap` over both arguments, or per-example gradients with respect to the
    kernel) are right, and as slow as JAX's own.

    Args:
        x: (H, W, C).
        kernel: (h, w, C, O).
        stride: of both axes.
        padding: zeros around the image: on every side, or ((top, bottom), (left, right)); None for
            'SAME', which with a stride pads less above than below.  PyTorch's `padding=1` is 1.

    Returns:
        (ceil(H / stride), ceil(W / stride), O) with 'SAME' padding, else
        ((H + top + bottom - h) // stride + 1, ..., O).

    Raises:
        ValueError: if the shapes do not fit.

    >>> convolve(jnp.ones((4, 4, 1)), jnp.ones((3, 3, 1, 1)))[..., 0]
    Array([[4., 6., 6., 4.],
           [6., 9., 9., 6.],
           [6., 9., 9., 6.],
           [4., 6., 6., 4.]], dtype=float32)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 3:
        cure = "Did you mean `jax.vmap`?" if x.ndim == 4 else "Pass one image of that shape."
        raise ValueError(f"`convolve(x=...)` has shape {x.shape}; it takes (H, W, C). {cure}")
    if kernel.ndim != 4 or kernel.shape[2] != x.shape[2]:
        raise ValueError(
            f"`convolve(kernel=...)` has shape {kernel.shape}; for x of shape {x.shape} it takes "
            f"(h, w, {x.shape[2]}, channels of the result)."
        )
    if stride < 1:
        raise ValueError(f"`convolve(stride={stride})` must be at least 1.")
    dtype = jnp.result_type(x, kernel)
    x, kernel = _alike(x.astype(dtype), kernel.astype(dtype))
    sizes = (x.shape[0], x.shape[1]), (kernel.shape[0], kernel.shape[1])
    pads = _pads(*sizes, stride, padding)
    if sizes[1] == (1, 1) and pads == (
        (0, 0),
        (0, 0),
    ):  # a matrix product is as fast, and XLA fuses it
        return jnp.dot(x[::stride, ::stride], kernel[0, 0])
    window = _Window(
        *sizes,
        stride,
        pads,
        jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    )
    return _APPLY.bind(x[None], kernel, window=window)[0]


_FOR_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


@functools.cache
def _understood() -> bool:
    """Whether this version of XLA knows the option; compiles a program of nothing to see."""
    try:
        jax.jit(lambda x: x, compiler_options=_FOR_CPU).lower(0.0).compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


def compiler_options() -> dict[str, str]:
    """For `jax.jit(..., compiler_options=...)` of what takes gradients of convolutions by kernels.

    On CPU, for versions of XLA that have the option: convolutions by XLA's own routine.  Without
    it a training step of the default `UNet` takes several times as long.  Empty elsewhere.  JAX
    takes such options for an outermost `jit` alone; training here has them.

    >>> step = jax.jit(lambda x, k: convolve(x, k).sum(), compiler_options=compiler_options())
    >>> float(step(jnp.ones((4, 4, 1)), jnp.ones((3, 3, 1, 1))))
    100.0
    """
    return dict(_FOR_CPU) if jax.default_backend() == "cpu" and _understood() else {}


def _alike(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Both varying over the same axes of a `shard_map`, as JAX's own operations make them."""
    over = [jax.typeof(value).manual_axis_type.varying for value in (x, kernel)]
    names = over[0] | over[1]
    x, kernel = (
        lax.pcast(value, tuple(names - its), to="varying") if names - its else value
        for value, its in zip((x, kernel), over, strict=True)
    )
    return x, kernel


class Conv(nnx.Module):
    """A convolution with bias of one image (H, W, C), 'SAME' padding; see `convolve`.

    Args:
        num_in, num_out: channels.
        size: of the kernel, an odd number.
        stride: the image shrinks by this factor, rounded up.
        zero: whether the kernel starts at zero, and the layer with it.
        dtype: in which to compute ("bfloat16", for instance); None for that of input and
            parameters.  Parameters are float32.
        rngs: the source of the initial kernel, of variance 1 / (inputs of an output).

    >>> conv = Conv(3, 8, stride=2, rngs=nnx.Rngs(0))
    >>> conv(jnp.ones((28, 28, 3))).shape
    (14, 14, 8)
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        size: int = 3,
        stride: int = 1,
        zero: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if size < 1 or size % 2 == 0:
            raise ValueError(
                f"`Conv(size={size})` must be odd, such as 1 or 3, to be centred on a pixel."
            )
        initial = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initial(rngs.params(), (size, size, num_in, num_out)))
        self.bias = nnx.Param(jnp.zeros(num_out))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """The result for one image."""
        dtype = self.dtype or jnp.result_type(x, self.kernel[...])
        kernel, bias = (value[...].astype(dtype) for value in (self.kernel, self.bias))
        return convolve(x.astype(dtype), kernel, stride=self.stride) + bias
