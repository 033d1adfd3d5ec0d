r"""Random changes of one picture that leave what it shows: `augment(x, *, key) -> x`.

Each function here makes such an augmentation: a frozen value, hashable, so that it can be a static
argument of `jax.jit`, without state.  `x` is one picture, (H, W) or (H, W, C), in data units; for
many, `jax.vmap` with one key for each,

    jax.vmap(lambda x, key: augment(x, key=key))(points, jax.random.split(key, len(points)))

`chain` puts several one after the other.  Whether an augmentation belongs into the training of a
score model is a question of its own: the model learns the distribution of what it is shown, and a
set with all its shifts has more dimensions than the set.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mmh_jax.typing import Array, ArrayLike, Key, check_key

__all__ = [
    "Augmentation",
    "brightness",
    "chain",
    "clip",
    "crop",
    "horizontal_flip",
    "noise",
    "shift",
]


class Augmentation(Protocol):
    """What the functions of this module make: a hashable value, called with one picture."""

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        """The changed picture, of the dtype of `x`."""
        ...


@dataclasses.dataclass(frozen=True)
class _Chain:
    steps: tuple[Augmentation, ...]

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        keys = jax.random.split(check_key("chain", key), len(self.steps))
        for step, step_key in zip(self.steps, keys, strict=True):
            x = step(x, key=step_key)
        return jnp.asarray(x)


@dataclasses.dataclass(frozen=True)
class _HorizontalFlip:
    probability: float

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        x = _picture("horizontal_flip", x)
        turned = jax.random.bernoulli(check_key("horizontal_flip", key), self.probability)
        return jnp.where(turned, x[:, ::-1], x)


@dataclasses.dataclass(frozen=True)
class _Shift:
    max_pixels: int
    fill: float | None

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        x = _picture("shift", x)
        width = [(self.max_pixels, self.max_pixels)] * 2 + [(0, 0)] * (x.ndim - 2)
        if self.fill is None:
            padded = jnp.pad(x, width, mode="edge")
        else:
            padded = jnp.pad(x, width, constant_values=self.fill)
        start = jax.random.randint(check_key("shift", key), (2,), 0, 2 * self.max_pixels + 1)
        return _window(padded, start, x.shape)


@dataclasses.dataclass(frozen=True)
class _Crop:
    height: int
    width: int

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        x = _picture("crop", x)
        room = jnp.array([x.shape[0] - self.height, x.shape[1] - self.width])
        if x.shape[0] < self.height or x.shape[1] < self.width:
            raise ValueError(
                f"`crop(height={self.height}, width={self.width})` is larger than the picture of "
                f"shape {x.shape}. Take a smaller one, or `shift`, which pads."
            )
        start = jax.random.randint(check_key("crop", key), (2,), 0, room + 1)
        return _window(x, start, (self.height, self.width, *x.shape[2:]))


@dataclasses.dataclass(frozen=True)
class _Noise:
    sigma: float

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        x = _floating("noise", x)
        return x + self.sigma * jax.random.normal(check_key("noise", key), x.shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class _Brightness:
    max_change: float

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        x = _floating("brightness", x)
        key = check_key("brightness", key)
        return x + self.max_change * jax.random.uniform(key, (), x.dtype, -1, 1)


@dataclasses.dataclass(frozen=True)
class _Clip:
    low: float
    high: float

    def __call__(self, x: ArrayLike, *, key: Key) -> Array:
        return jnp.clip(_floating("clip", x), self.low, self.high)


def chain(*steps: Augmentation) -> Augmentation:
    """One augmentation after the other, each with a key of its own.

    Raises:
        TypeError: if a step is not callable or cannot be hashed.

    >>> jitter = chain(horizontal_flip(), shift(2), noise(0.01), clip(0.0, 1.0))
    >>> jitter(jnp.ones((8, 8, 3)), key=jax.random.key(0)).shape
    (8, 8, 3)
    """
    for step in steps:
        if not callable(step):
            raise TypeError(f"`chain` got {step!r}, which is no augmentation; pass `shift(2)`.")
        hash(step)
    return _Chain(steps)


def horizontal_flip(probability: float = 0.5) -> Augmentation:
    """Left and right exchanged, with this probability.

    Not for digits and letters, which it makes into others.

    >>> horizontal_flip(1.0)(jnp.array([[1.0, 2.0]]), key=jax.random.key(0))
    Array([[2., 1.]], dtype=float32)
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"`horizontal_flip(probability={probability})` must lie between 0 and 1.")
    return _HorizontalFlip(float(probability))


def shift(max_pixels: int, *, fill: float | None = 0.0) -> Augmentation:
    """Moved by -max_pixels to max_pixels in both directions, each whole step equally likely.

    The same as padding by `max_pixels` on all sides and cropping to the old size.

    Args:
        max_pixels: at least 0.
        fill: the value of what comes in from outside, in data units; None repeats the edge.

    >>> moved = shift(1)(jnp.ones((3, 3)), key=jax.random.key(1))
    >>> moved.shape, float(moved.sum()) in (4.0, 6.0, 9.0)
    ((3, 3), True)
    """
    if not isinstance(max_pixels, int) or isinstance(max_pixels, bool) or max_pixels < 0:
        raise ValueError(f"`shift(max_pixels={max_pixels!r})` must be an integer of at least 0.")
    return _Shift(max_pixels, None if fill is None else _number("shift", "fill", fill))


def crop(height: int, width: int) -> Augmentation:
    """A window of this size, each place equally likely.

    Raises:
        ValueError: if a size is no positive integer; when called, if the picture is smaller.

    >>> crop(2, 3)(jnp.ones((8, 8, 3)), key=jax.random.key(0)).shape
    (2, 3, 3)
    """
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`crop({name}={size!r})` must be a positive integer.")
    return _Crop(height, width)


def noise(sigma: float) -> Augmentation:
    """Gaussian noise of standard deviation `sigma` added to every value; for x of any shape.

    Values may leave the range of a picture; `chain(noise(sigma), clip(0.0, 1.0))` keeps them.

    >>> float(noise(0.0)(jnp.ones(2), key=jax.random.key(0)).sum())
    2.0
    """
    if _number("noise", "sigma", sigma) < 0:
        raise ValueError(f"`noise(sigma={sigma})` must be at least 0.")
    return _Noise(float(sigma))


def brightness(max_change: float) -> Augmentation:
    """One number added to all values, uniform from -max_change to max_change; x of any shape.

    >>> change = brightness(0.1)(jnp.zeros((4, 4)), key=jax.random.key(0))
    >>> bool(abs(change[0, 0]) <= 0.1), bool((change == change[0, 0]).all())
    (True, True)
    """
    if _number("brightness", "max_change", max_change) < 0:
        raise ValueError(f"`brightness(max_change={max_change})` must be at least 0.")
    return _Brightness(float(max_change))


def clip(low: float, high: float) -> Augmentation:
    """Values below `low` or above `high` are brought there; nothing random; x of any shape.

    >>> clip(0.0, 1.0)(jnp.array([-1.0, 0.5, 2.0]), key=jax.random.key(0))
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    if not _number("clip", "low", low) <= _number("clip", "high", high):
        raise ValueError(f"`clip(low={low}, high={high})`: the range is empty; exchange them.")
    return _Clip(float(low), float(high))


def _number(caller: str, name: str, value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"`{caller}({name}={value})` must be a finite number, in data units.")
    return float(value)


def _picture(caller: str, x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if x.ndim not in (2, 3):
        raise ValueError(
            f"`{caller}(...)(x=...)` has shape {x.shape}; it takes one picture, (H, W) or "
            "(H, W, C). For many, `jax.vmap`."
        )
    return x


def _floating(caller: str, x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{caller}(...)(x=...)` has dtype {x.dtype}; it takes real data units, for example "
            "`x.astype(float) / 255`."
        )
    return x


def _window(x: Array, start: Array, shape: tuple[int, ...]) -> Array:
    begin = [start[0], start[1]] + [jnp.zeros_like(start[0])] * (x.ndim - 2)
    return jax.lax.dynamic_slice(x, begin, shape)
