r"""A per-point function over many points: chunks, keys, progress, devices.

`over_points` is `jax.vmap` for data sets that do not fit in one batch.  It compiles one chunk once,
pads the last chunk to the same size, gives every point its own key (split from one key by position,
before chunking), and brings results to host memory as it goes.  A point's result therefore depends
on the point, its position and the key, never on the chunk size or the number of devices (beyond the
last bits in which a backend's matrix product rounds differently for different batch sizes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmh_jax.typing import Key

__all__ = ["over_points"]

Progress = Callable[[int, int], None]
Axes = tuple[int | None, ...]


def over_points(
    function: Callable[..., Any],
    in_axes: Axes | int = 0,
    *,
    chunk_size: int = 64,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    shared_specs: Sequence[Any] | None = None,
) -> Callable[..., Any]:
    """Map `function` over the leading axis of its arguments, in chunks.

    Args:
        function: a per-point function that returns a pytree of arrays.
        in_axes: for each positional argument, 0 (one slice per point) or None (shared: a denoiser,
            a noise level).  A single 0 means that all are mapped.
        chunk_size: points evaluated at once on each device; the peak memory grows with it.
        progress: called as `progress(done, total)` after each chunk.
        mesh: a device mesh; each chunk is spread over all its devices, shared arguments are
            copied to each of them once.  With several processes every one of them makes the same
            call, with the same arguments, and has all results.
        shared_specs: for each shared argument a `PartitionSpec`, or a pytree of them: it is split
            over the axes of the mesh that they name, and the points are spread over the others.
            `function` then sees one part, and has to combine the parts by collectives.

    Returns:
        `mapped(*args, key=None, progress=progress)`, whose results are NumPy arrays with a leading
        axis of length N.  With `key`, `function` is also passed `key=`, a different one for each
        point; an array of N keys is taken as it is, one for each.  Keep the returned function: it
        holds the compiled program.  Shared arguments are arguments of that program, not constants
        in it: another denoiser of the same structure compiles nothing.

    Raises:
        ValueError: if the mapped arguments, or keys, disagree on N, if N is 0, if `in_axes` does
            not fit the arguments, or if `chunk_size < 1`.
        TypeError: if a shared argument is not a pytree of arrays and numbers.

    >>> square = over_points(lambda x: x**2, chunk_size=2)
    >>> square(np.arange(5.0))
    array([ 0.,  1.,  4.,  9., 16.], dtype=float32)
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            f"`over_points(chunk_size={chunk_size!r})` must be an integer, at least 1."
        )
    names, specs = _layout(mesh, shared_specs)
    compiled = _compile(function, mesh, names, specs)
    spread = None if mesh is None else NamedSharding(mesh, PartitionSpec(names))
    num_devices = 1 if mesh is None else math.prod(mesh.shape[name] for name in names)
    always = progress

    def mapped_function(
        *args: Any, key: Key | None = None, progress: Progress | None = always
    ) -> Any:
        axes = _axes(in_axes, len(args))
        mapped = [arg for arg, axis in zip(args, axes, strict=True) if axis == 0]
        shared = [arg for arg, axis in zip(args, axes, strict=True) if axis is None]
        total = _num_points(mapped)
        _check_shared(shared)
        if mesh is not None:
            shared = jax.device_put(shared, _placed(mesh, specs, shared))
        keys = jax.random.split(key, total) if key is not None and key.ndim == 0 else key
        if keys is not None and keys.shape != (total,):
            raise ValueError(
                f"`over_points(...)(key=...)` has keys of shape {keys.shape} for {total} points; "
                "pass one key, or one for each point."
            )
        step = num_devices * min(chunk_size, -(-total // num_devices))
        chunks = []
        for start in range(0, total, step):
            # The last chunk repeats its final point up to the full size; the copies are cut off.
            index = np.minimum(np.arange(start, start + step), total - 1)
            stop = min(start + step, total)
            chunk = jax.tree.map(lambda leaf, index=index: leaf[index], (mapped, keys))
            chunk = jax.device_put(chunk, spread)
            result = compiled(axes, shared, *chunk)
            chunks.append(jax.tree.map(lambda leaf, n=stop - start: _to_host(leaf)[:n], result))
            if progress is not None:
                progress(stop, total)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)

    return mapped_function


def _to_host(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _layout(mesh: Mesh | None, shared_specs: Sequence[Any] | None) -> tuple[tuple[str, ...], Any]:
    """The axes over which points are spread, and how shared arguments are split, or copied."""
    if mesh is None:
        return (), PartitionSpec()
    if shared_specs is None:
        return tuple(map(str, mesh.axis_names)), PartitionSpec()
    leaves = jax.tree.leaves(list(shared_specs), is_leaf=lambda s: isinstance(s, PartitionSpec))
    entries = [entry for spec in leaves for entry in spec if entry is not None]
    taken = {name for entry in entries for name in (entry if isinstance(entry, tuple) else [entry])}
    if not taken <= set(mesh.axis_names):
        raise ValueError(
            f"`over_points(shared_specs=...)` names the axes {sorted(taken)}, but the mesh has "
            f"{mesh.axis_names}."
        )
    return tuple(str(name) for name in mesh.axis_names if name not in taken), list(shared_specs)


def _placed(mesh: Mesh, specs: Any, shared: list[Any]) -> Any:
    """The sharding of every leaf of the shared arguments."""

    def below(spec: PartitionSpec, subtree: Any) -> Any:
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), subtree)

    return jax.tree.map(below, specs, shared, is_leaf=lambda s: isinstance(s, PartitionSpec))


def _compile(
    function: Callable[..., Any], mesh: Mesh | None, names: tuple[str, ...], specs: Any
) -> Callable[..., Any]:
    """`run(axes, shared, mapped, keys)` over one chunk, compiled once for each shape."""

    def run(axes: Axes, shared: list[Any], mapped: list[Any], keys: Key | None) -> Any:
        def at_one_point(mapped: list[Any], key: Key | None) -> Any:
            mapped_args, shared_args = iter(mapped), iter(shared)
            args = [next(shared_args if axis is None else mapped_args) for axis in axes]
            return function(*args) if key is None else function(*args, key=key)

        return jax.vmap(at_one_point)(mapped, keys)

    def run_on_mesh(axes: Axes, shared: list[Any], mapped: list[Any], keys: Key | None) -> Any:
        spread = PartitionSpec(names)
        return jax.shard_map(
            lambda shared, mapped, keys: run(axes, shared, mapped, keys),
            mesh=mesh,
            in_specs=(specs, spread, spread),
            out_specs=spread,
            check_vma=False,
        )(shared, mapped, keys)

    return jax.jit(run if mesh is None else run_on_mesh, static_argnums=0)


def _axes(in_axes: Axes | int, num_args: int) -> Axes:
    """`in_axes` for each argument, or what is wrong with it."""
    axes = (in_axes,) * num_args if isinstance(in_axes, int) else tuple(in_axes)
    if len(axes) != num_args or any(axis is not None and axis != 0 for axis in axes):
        raise ValueError(
            f"`over_points(in_axes={in_axes})` must be 0, or hold one 0 or None for each of the "
            f"{num_args} arguments; move another axis to the front with `jnp.moveaxis`."
        )
    return axes


def _num_points(mapped: list[Any]) -> int:
    """The common length of the leading axes."""
    leaves = jax.tree.leaves(mapped)
    if not leaves:
        raise ValueError(
            "`over_points` has no argument to map: `in_axes` needs at least one 0, for an array "
            "with one slice per point."
        )
    if any(np.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(
            "a mapped argument holds a scalar; give it a leading axis with one slice per point, "
            "or share it with `in_axes=None` (a list is a pytree: pass an array)."
        )
    lengths = {np.shape(leaf)[0] for leaf in leaves}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the mapped arguments have {sorted(lengths)} points; "
            "they must all have the same number, at least one."
        )
    return lengths.pop()


def _check_shared(shared: list[Any]) -> None:
    for leaf in jax.tree.leaves(shared):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"a shared argument of `over_points` holds a {type(leaf).__name__}; it takes "
                "pytrees of arrays and numbers. Close over functions and settings instead: "
                "`over_points(lambda x: function(x, setting))`."
            )
