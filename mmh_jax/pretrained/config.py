r"""The options of a published configuration, checked against the names and types that are known.

A configuration is a JSON object.  An option that is not known could change what the network
computes, so that it is refused by name and never ignored; one that is `null` is as if it were not
there.  Names that begin with an underscore (`_class_name`, `_diffusers_version`) describe the file.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["check_blocks", "one_of", "options", "per_block"]

_Options = TypeVar("_Options")
_MOST = 2**17  # of any size; the largest published ones are some 10,000
_MOST_LAYERS = 32  # of one block; the largest published number is 10
_MOST_BLOCKS = 16


def options(kind: type[_Options], config: Mapping[str, Any], *, ignored: Iterable[str] = ()) -> Any:
    """The options of a configuration as a frozen dataclass.

    Args:
        kind: the dataclass; its annotations say the types, its name without "Options" is named in
            errors.
        config: from a `config.json`; lists become tuples.
        ignored: names that are allowed and change nothing of the answer.

    Raises:
        TypeError: if the configuration is no mapping, or an option not of its type.
        ValueError: if there are unknown options.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class NetOptions:
    ...     widths: tuple[int, ...] = (4, 8)
    >>> options(NetOptions, {"widths": [2, 3], "_class_name": "Net"})
    NetOptions(widths=(2, 3))
    """
    caller = kind.__name__.removesuffix("Options")
    if not isinstance(config, Mapping):
        raise TypeError(f"`{caller}(config=...)` is a {type(config).__name__}, not a mapping.")
    hints = typing.get_type_hints(kind)
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = {
        name
        for name, value in given.items()
        if name not in hints and name not in set(ignored) and value is not None
    }
    if unknown:
        listed = ", ".join(sorted(name[:80] for name in unknown)[:10])
        raise ValueError(
            f"`{caller}(config=...)` has options that are not known here: {listed}. They may "
            "change the answer; a network that needs them cannot be read."
        )
    found = {name: _tupled(value) for name, value in given.items() if name in hints}
    for name, value in found.items():
        if not _fits(value, hints[name]):
            raise TypeError(
                f"`{caller}(config=...)` has {name}={str(value)[:80]}; it takes "
                f"{_written(hints[name])}."
            )
    # For an option that may not be null, null means its default, as for one that is left out.
    return kind(**{n: v for n, v in found.items() if v is not None or _fits(None, hints[n])})


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    if value is None:
        return hint is type(None) or type(None) in typing.get_args(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is tuple:
        return isinstance(value, tuple) and 0 < len(value) <= 64 and all(
            _fits(item, inner[0]) for item in value
        )  # fmt: skip
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and (
            math.isfinite(value)
        )  # fmt: skip
    return isinstance(value, hint)


def _written(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def one_of(caller: str, name: str, value: Any, known: Sequence[Any]) -> Any:
    """`value`, if it is one of those known.

    Raises:
        ValueError: if it is not.

    >>> one_of("Net", "mode", "a", ("a", "b"))
    'a'
    """
    if value not in known:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"`{caller}({name}={value!r})` is not known here; known: {listed}.")
    return value


def check_blocks(caller: str, widths: Sequence[int], *kinds: Sequence[str]) -> None:
    """Refuse lists of blocks that do not agree, or that are absurdly long.

    Raises:
        ValueError: if so.

    >>> check_blocks("Net", (8, 16), ("DownBlock2D",) * 2, ("UpBlock2D",) * 2)
    """
    if len({len(widths), *map(len, kinds)}) > 1:
        raise ValueError(
            f"`{caller}(config=...)` has {len(widths)} `block_out_channels` for "
            f"{' and '.join(str(len(kind)) for kind in kinds)} blocks down and up; they must agree."
        )
    if len(widths) > _MOST_BLOCKS or min(widths) < 1:
        raise ValueError(
            f"`{caller}(block_out_channels={tuple(widths)[:20]})` must be at most {_MOST_BLOCKS} "
            "positive numbers."
        )


def per_block(caller: str, name: str, value: Any, num: int, *, layers: bool = False) -> tuple:
    """One value for each block, from one for all or from a tuple of them.

    Args:
        caller, name: of the option, for an error.
        value: the option.
        num: of blocks.
        layers: whether the values are numbers of layers, which have a limit.

    Raises:
        ValueError: if there are not `num` of them, or too many layers.

    >>> per_block("Net", "heads", 8, 2), per_block("Net", "heads", (4, 8), 2)
    ((8, 8), (4, 8))
    """
    found = value if isinstance(value, tuple) else (value,) * num
    if len(found) != num:
        raise ValueError(f"`{caller}({name}={value})` has {len(found)} values for {num} blocks.")
    if layers and not all(_few(item) for item in found):
        raise ValueError(f"`{caller}({name}={value})` must be between 1 and {_MOST_LAYERS}.")
    return found


def _few(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_few, value))
    return 1 <= value <= _MOST_LAYERS
