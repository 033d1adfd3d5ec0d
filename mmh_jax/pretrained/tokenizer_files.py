r"""The files of a CLIP tokenizer.

    vocab.json               an object, token to id
    merges.txt               two tokens a line, to be joined, the first line first
    tokenizer_config.json    special tokens, the length; in newer ones `added_tokens_decoder`
    special_tokens_map.json  special tokens again: overrules an older `tokenizer_config.json`
    added_tokens.json        in older ones: further tokens and their ids
    tokenizer.json           vocabulary, merges and further tokens in one: all that newer versions
                             of transformers write, read where there is no vocab.json

Stable Diffusion 1 pads with the end of text, Stable Diffusion 2 and the second tokenizer of SDXL
with `!`, whose id is 0; both say so in these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmh_jax.pretrained.files import MAX_JSON_BYTES, absent, fault, read_json, shown
from mmh_jax.pretrained.tokenizer import MARKS, SpecialToken, Tokenizer

__all__ = ["load_tokenizer"]

MAX_LENGTH = 4096
CURE = "Use the file that was published with this model."
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


def load_tokenizer(folder: str | Path, *, caller: str = "load_tokenizer") -> Tokenizer:
    """Read a tokenizer's folder: `vocab.json`, `merges.txt`, and what is special from the others.

    The others are `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, of
    which none need be there.  Without them padding is the end-of-text token and the length 77.

    Args:
        folder: such as `tokenizer` or `tokenizer_2` in a pipeline.
        caller: the function to name in an error.

    Raises:
        FileNotFoundError: if there is no vocabulary or there are no merges.
        ValueError: if a file is too large, is no such file, or asks for what is not supported.
    """
    reader = _Reader(Path(folder), caller)
    vocab = reader.vocabulary()
    merges = reader.merges(vocab)
    config = reader.json("tokenizer_config.json", optional=True)
    named, special = reader.special_tokens(config, vocab)
    ids = {token.content: token.id for token in special}
    return Tokenizer(
        vocab,
        merges,
        special,
        begin=ids[named["bos_token"]],
        end=ids[named["eos_token"]],
        pad=ids[named["pad_token"]],
        unknown=ids[named["unk_token"]],
        max_length=reader.length(config),
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _spaced(pair: Any) -> str:
    """Two tokens as a line of `merges.txt`; what is no pair of texts becomes no such line."""
    good = isinstance(pair, list) and all(isinstance(token, str) for token in pair)
    return " ".join(pair) if good else ""


class _Reader:
    """The files of one folder."""

    def __init__(self, folder: Path, caller: str):
        self.folder = folder
        self.caller = caller

    def wrong(self, name: str, what: str, cure: str = CURE) -> ValueError:
        return fault(self.caller, self.folder / name, what, cure)

    def json(self, name: str, *, optional: bool = False) -> dict[str, Any]:
        if optional and not (self.folder / name).is_file():
            return {}
        return read_json(self.folder / name, caller=self.caller)

    def whole(self) -> dict[str, Any] | None:
        """The model in `tokenizer.json`, if that is all there is."""
        name = "tokenizer.json"
        if (self.folder / "vocab.json").is_file() or not (self.folder / name).is_file():
            return None
        model: Any = self.json(name).get("model")
        model = model if isinstance(model, dict) else {}
        is_known = model.get("type", "BPE") == "BPE" and model.get("end_of_word_suffix") == "</w>"
        if not is_known or model.get("continuing_subword_prefix"):
            raise self.wrong(name, "is not of a byte-pair encoding whose words end in </w>")
        if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
            raise self.wrong(name, "has no vocabulary and merges")
        return model

    def vocabulary(self) -> dict[str, int]:
        model = self.whole()
        vocab = self.json("vocab.json") if model is None else model["vocab"]
        for token, index in vocab.items():
            if not _is_id(index):
                raise self.wrong("vocab.json", f"gives {shown(token)} the id {shown(index)}")
        if len(set(vocab.values())) != len(vocab):
            raise self.wrong("vocab.json", "gives two tokens the same id")
        return vocab

    def merges(self, vocab: Mapping[str, int]) -> dict[tuple[int, int], tuple[int, int]]:
        """Ids of left and right to the rank and the id of both joined."""
        found: dict[tuple[int, int], tuple[int, int]] = {}
        model = self.whole()
        if model is None:
            lines = self._text("merges.txt").removesuffix("\n").split("\n")
        else:  # newer files have pairs, older ones texts
            lines = [line if isinstance(line, str) else _spaced(line) for line in model["merges"]]
        rank = 0
        for number, line in enumerate(lines, 1):
            if line.startswith("#version"):
                continue
            parts = line.removesuffix("\r").split(" ")
            if len(parts) != 2:
                what = f"has {shown(line)} in line {number}, where two tokens should be"
                raise self.wrong("merges.txt", what)
            left, right, joined = tokens = (*parts, "".join(parts))
            if unknown := [token for token in tokens if token not in vocab]:
                what = f"has {shown(unknown[0])} in line {number}, which is not in vocab.json"
                raise self.wrong("merges.txt", what)
            found[vocab[left], vocab[right]] = (rank, vocab[joined])
            rank += 1
        return found

    def _text(self, name: str) -> str:
        path = self.folder / name
        if not path.is_file():
            raise absent(self.caller, path, "does not exist", "Copy the whole folder of the model.")
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise self.wrong(name, f"has more than {MAX_JSON_BYTES:,} bytes")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self.wrong(name, f"is not UTF-8 ({error})") from None

    def length(self, config: Mapping[str, Any]) -> int:
        """How many ids a text has; and a check of the other options."""
        for option, only in _ONLY.items():
            if config.get(option, only) != only:
                raise self.wrong(
                    "tokenizer_config.json",
                    f"has the {option} {shown(config[option])}",
                    f"Only {only!r} is supported.",
                )
        length = config.get("model_max_length", 77)
        if isinstance(length, float | int) and length > MAX_LENGTH:
            return 77  # what stands there (1e30) when nobody said a length
        if not _is_id(length) or length < 2:
            raise self.wrong(
                "tokenizer_config.json",
                f"has the model_max_length {shown(length)}",
                "It is a whole number of at least 2, 77 for CLIP.",
            )
        return int(length)

    def special_tokens(
        self, config: Mapping[str, Any], vocab: Mapping[str, int]
    ) -> tuple[dict[str, str], tuple[SpecialToken, ...]]:
        """The content of each named token, and all tokens that are cut out."""
        where = "tokenizer_config.json"
        named: dict[str, Any] = {**_DEFAULTS, **{k: config[k] for k in _NAMED if config.get(k)}}
        if "added_tokens_decoder" in config:
            decoder = config["added_tokens_decoder"]
            if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
                raise self.wrong(where, "has an added_tokens_decoder that is no table of ids")
            added = {int(key): value for key, value in decoder.items()}
            added_in = where
        elif self.whole() is not None:
            added_in = "tokenizer.json"
            listed = self.json(added_in).get("added_tokens") or []
            if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
                raise self.wrong(added_in, "has added_tokens that are no list of tokens")
            added = {each.get("id"): each for each in listed}
        else:  # written before that option existed
            table = self.json("special_tokens_map.json", optional=True)
            named |= {name: table[name] for name in _NAMED if table.get(name)}
            where = "special_tokens_map.json" if table else where
            contents = {self._content(where, value)[0] for value in named.values()}
            added_in = "added_tokens.json"
            added = {
                index: {"content": token, "normalized": token not in contents}
                for token, index in self.json(added_in, optional=True).items()
            }
        special = self._added(added_in, added, vocab)
        found = {name: self._content(where, named[name]) for name in _NAMED if name in named}
        known = set(special)
        for content, normalized in dict.fromkeys(found.values()):
            if content not in vocab and content not in known:
                what = f"names the special token {shown(content)}, which is not in vocab.json"
                raise self.wrong(where, what)
            if content not in known:
                special[content] = SpecialToken(content, vocab[content], normalized)
        return {name: found[name][0] for name in _DEFAULTS}, tuple(special.values())

    def _added(
        self, name: str, added: Mapping[Any, Any], vocab: Mapping[str, int]
    ) -> dict[str, SpecialToken]:
        """Tokens with a given id, which is that of the vocabulary or the next after it."""
        special: dict[str, SpecialToken] = {}
        if not all(map(_is_id, added)):
            raise self.wrong(name, "gives a token an id that is no whole number")
        size = len(vocab)
        for index, value in sorted(added.items()):
            content, normalized = self._content(name, value)
            expected = vocab.get(content, size)
            if index != expected:
                raise self.wrong(
                    name,
                    f"gives the added token {shown(content)} the id {index}",
                    f"It is {expected} by vocab.json and the tokens added before.",
                )
            size += content not in vocab
            special[content] = SpecialToken(content, index, normalized)
        return special

    def _content(self, name: str, value: Any) -> tuple[str, bool]:
        """The string of an added token, and whether it is looked for in the cleaned text."""
        if isinstance(value, str):
            value = {"content": value, "special": True}
        content = value.get("content") if isinstance(value, dict) else None
        if not isinstance(content, str) or not content:
            raise self.wrong(name, f"has the token {shown(value)}, which has no content")
        for option in ("lstrip", "rstrip", "single_word"):
            if value.get(option):
                what = f"has {option} for the token {shown(content)}"
                raise self.wrong(name, what, "This is not supported.")
        return content, bool(value.get("normalized", not value.get("special", False)))
