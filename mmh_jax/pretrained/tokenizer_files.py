r"""The files of a CLIP tokenizer.

    vocab.json               an object, token to id
    merges.txt               two tokens a line, to be joined, the first line first
    tokenizer_config.json    special tokens, the length; in newer ones `added_tokens_decoder`
    special_tokens_map.json  special tokens again: overrules an older `tokenizer_config.json`
    added_tokens.json        in older ones: further tokens and their ids

Stable Diffusion 1 pads with the end of text, Stable Diffusion 2 and the second tokenizer of SDXL
with `!`, whose id is 0; both say so in these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmh_jax.pretrained.tokenizer import MARKS, SpecialToken, Tokenizer

__all__ = ["load_tokenizer"]

MAX_BYTES = 32 * 2**20  # of a file: CLIP's own vocabulary has 1 MB
MAX_LENGTH = 4096


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer's folder: `vocab.json`, `merges.txt`, and what is special from the others.

    The others are `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, of
    which none need be there.  Without them padding is the end-of-text token and the length 77.

    Args:
        folder: such as `tokenizer` or `tokenizer_2` in a pipeline.

    Raises:
        FileNotFoundError: if there is no vocabulary or there are no merges.
        ValueError: if a file is too large, is no such file, or asks for what is not supported.
    """
    folder = Path(folder)
    vocab = _vocabulary(folder / "vocab.json")
    merges = _merges(folder / "merges.txt", vocab)
    config = _json_object(folder / "tokenizer_config.json", missing={})
    _refuse(folder / "tokenizer_config.json", config)
    named, special = _special_tokens(folder, config, vocab)
    length = config.get("model_max_length", 77)
    if isinstance(length, float | int) and length > MAX_LENGTH:
        length = 77  # what is written there (1e30) when nobody said a length
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise ValueError(
            f"{folder}/tokenizer_config.json has model_max_length {length!r}; it is a whole number "
            "of at least 2, 77 for CLIP."
        )
    ids = {token.content: token.id for token in special}
    return Tokenizer(
        vocab,
        merges,
        special,
        begin=ids[named["bos_token"]],
        end=ids[named["eos_token"]],
        pad=ids[named["pad_token"]],
        unknown=ids[named["unk_token"]],
        max_length=length,
    )


_DEFAULTS = {
    "bos_token": MARKS[0],
    "eos_token": MARKS[1],
    "unk_token": MARKS[1],
    "pad_token": MARKS[1],
}
# In this order they are added; of two ways to look for the same string, the later counts.
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_ONLY = {  # what changes ids, and the one value that is supported
    "do_lower_case": True,
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,
    "add_prefix_space": False,
}


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    for name, only in _ONLY.items():
        if config.get(name, only) != only:
            raise ValueError(f"{path} has {name} {config[name]!r}; only {only!r} is supported.")


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; a CLIP tokenizer is a folder with vocab.json and "
            "merges.txt."
        )
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes; CLIP's have about a million.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _json_object(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is a JSON {type(found).__name__}; an object is expected.")
    return found


def _vocabulary(path: Path) -> dict[str, int]:
    vocab = _json_object(path)
    for token, index in vocab.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 2**31:
            raise ValueError(
                f"{path} gives {token!r} the id {index!r}; an id is a whole number from 0 on."
            )
    if len(set(vocab.values())) != len(vocab):
        raise ValueError(f"{path} gives two tokens the same id.")
    return vocab


def _merges(path: Path, vocab: Mapping[str, int]) -> dict[tuple[int, int], tuple[int, int]]:
    merges: dict[tuple[int, int], tuple[int, int]] = {}
    lines = _read(path).removesuffix("\n").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    rank = 0
    for number, line in enumerate(lines, 1):
        if line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(f"{path} line {number} is {line[:80]!r}; it is two tokens, one space.")
        ids = [vocab.get(token) for token in (*parts, "".join(parts))]
        if None in ids:
            absent = (*parts, "".join(parts))[ids.index(None)]
            raise ValueError(f"{path} line {number}: {absent[:80]!r} is not in vocab.json.")
        left, right, joined = ids
        merges[left, right] = (rank, joined)  # type: ignore[index, assignment]
        rank += 1
    return merges


def _special_tokens(
    folder: Path, config: Mapping[str, Any], vocab: Mapping[str, int]
) -> tuple[dict[str, str], tuple[SpecialToken, ...]]:
    """The content of each named token, and all tokens that are cut out."""
    where = folder / "tokenizer_config.json"
    named: dict[str, Any] = {**_DEFAULTS, **{k: config[k] for k in _NAMED if config.get(k)}}
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
            raise ValueError(f"{where} has an added_tokens_decoder that is no table of ids.")
        added = {int(key): value for key, value in decoder.items()}
    else:  # written before that option existed
        table = _json_object(folder / "special_tokens_map.json", missing={})
        named |= {name: table[name] for name in _NAMED if table.get(name)}
        where = folder / "added_tokens.json"
        contents = {_content(folder, value)[0] for value in named.values()}
        added = {
            index: {"content": token, "normalized": token not in contents}
            for token, index in _json_object(where, missing={}).items()
        }
    special = _added(where, added, vocab)
    found = {name: _content(folder, named[name]) for name in _NAMED if name in named}
    known = set(special)
    for content, normalized in dict.fromkeys(found.values()):
        if content not in vocab and content not in known:
            raise ValueError(f"{folder}: the special token {content!r} is not in vocab.json.")
        if content not in known:
            special[content] = SpecialToken(content, vocab[content], normalized)
    return {name: found[name][0] for name in _DEFAULTS}, tuple(special.values())


def _added(
    where: Path, added: Mapping[Any, Any], vocab: Mapping[str, int]
) -> dict[str, SpecialToken]:
    """Tokens with a given id, which is that of the vocabulary or the next after it."""
    special: dict[str, SpecialToken] = {}
    if not all(isinstance(index, int) for index in added):
        raise ValueError(f"{where} gives a token an id that is no whole number.")
    size = len(vocab)
    for index, value in sorted(added.items()):
        content, normalized = _content(where, value)
        expected = vocab.get(content, size)
        if index != expected:
            raise ValueError(
                f"{where} gives the added token {content!r} the id {index}; it is {expected} by "
                "vocab.json and the tokens added before."
            )
        size += content not in vocab
        special[content] = SpecialToken(content, index, normalized)
    return special


def _content(where: Path, value: Any) -> tuple[str, bool]:
    """The string of an added token, and whether it is looked for in the cleaned text."""
    if isinstance(value, str):
        return value, False
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{where} has the token {value!r}; it is a string or has a content.")
    for option in ("lstrip", "rstrip", "single_word"):
        if value.get(option):
            raise ValueError(
                f"{where} has {option} for the token {value['content']!r}, which is not supported."
            )
    if not value["content"]:
        raise ValueError(f"{where} has a token with an empty content.")
    return value["content"], bool(value.get("normalized", not value.get("special", False)))
