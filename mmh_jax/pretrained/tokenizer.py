r"""CLIP's tokenizer: text to token ids by byte-pair encoding, from `vocab.json` and `merges.txt`.

    text -> special tokens cut out -> NFC, runs of white space to one space, lower case
         -> words: contractions, runs of letters, single numbers, runs of anything else
         -> the bytes of a word in UTF-8, each written as a printable character, the last one
            with "</w>" -> the neighbours of least rank in `merges.txt` are joined, until none is
         -> begin, ids, end, padding up to 77

(Radford et al. 2021, 2103.00020; Sennrich et al. 2016, 1508.07909).  Letters and numbers are the
Unicode categories L* and N*.  The ids are those of transformers' `CLIPTokenizer` (version 5, which
cleans text so, without `ftfy`), special tokens included: where `!` is the padding, as in Stable
Diffusion 2, a `!` anywhere in a text is that token, even inside a word.

Known difference: Python's and transformers' tables of Unicode are of different versions.  A
character that Python's does not know yet (before 3.13: of Unicode 15 and later), or a sequence of
combining marks, out of order, with one of Unicode 10 and later, may be cut or ordered otherwise.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["SpecialToken", "Tokenizer", "words"]

END_OF_WORD = "</w>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
MARKS = ("<|startoftext|>", "<|endoftext|>")  # of the published pattern, whatever the files say
_MARK_PARTS = ("<|", "startoftext", "endoftext", "|>")
# White_Space of Unicode; Python's `\s` has four control characters more.
_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


@dataclasses.dataclass(frozen=True)
class SpecialToken:
    """A token that is cut out of a text before anything else.

    Attributes:
        content: the string it is written as.
        id: its id.
        normalized: whether it is looked for in the cleaned text (so in any case), or in the text
            as it was given.
    """

    content: str
    id: int
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids; usually made by `load_tokenizer`.

    Attributes:
        vocab: the id of each token.
        merges: `(left id, right id)` to `(rank, id of both joined)`; the least rank goes first.
        special: the tokens cut out of a text.
        begin, end, pad, unknown: ids.
        max_length: of the result; 77 for CLIP.

    >>> vocab = {"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    >>> merges = {(0, 1): (0, 2)}
    >>> tokenizer = Tokenizer(vocab, merges, begin=3, end=4, pad=4, unknown=4, max_length=6)
    >>> tokenizer("Ab  AAB")
    array([3, 2, 0, 2, 4, 4], dtype=int32)
    """

    vocab: Mapping[str, int]
    merges: Mapping[tuple[int, int], tuple[int, int]]
    special: tuple[SpecialToken, ...] = ()
    _: dataclasses.KW_ONLY
    begin: int
    end: int
    pad: int
    unknown: int
    max_length: int = 77

    def __call__(self, text: str) -> np.ndarray:
        """The ids of a text, cut or padded to `max_length`: int32, (max_length,).

        Args:
            text: one prompt; "" is the empty prompt.

        Raises:
            TypeError: if it is no string.
            ValueError: if it has half a character, a lone surrogate.
        """
        return self.padded(list(itertools.islice(self._ids(text), self.max_length - 2)))

    def encode(self, text: str) -> list[int]:
        """All ids of a text, without begin, end, padding and cut."""
        return list(self._ids(text))

    def padded(self, ids: Sequence[int]) -> np.ndarray:
        """Ids as `encode` gives them, between begin and end, and padding: int32, (max_length,).

        Raises:
            ValueError: if they are more than there is room for.
        """
        if len(ids) > self.max_length - 2:
            raise ValueError(
                f"`padded(ids=...)` has {len(ids)}; there is room for {self.max_length - 2}."
            )
        found = [self.begin, *ids, self.end]
        return np.asarray(found + [self.pad] * (self.max_length - len(found)), np.int32)

    def by_word(self, text: str) -> list[tuple[str, list[int]]]:
        """What stands between white space, and the ids of each; together those of `encode`."""
        parts = _SPACE.sub(" ", text).split(" ")
        return [(part, self.encode(part)) for part in parts if part]

    @property
    def special_ids(self) -> frozenset[int]:
        """Of begin, end, padding, the unknown, and all tokens that are cut out of a text."""
        marks = (self.begin, self.end, self.pad, self.unknown)
        return frozenset(marks).union(token.id for token in self.special)

    def tokens(self, ids: Any) -> list[str]:
        """The token of each id, as the vocabulary writes it; for showing them.

        Raises:
            ValueError: if there is no token with an id.
        """
        names = {index: token for token, index in self.vocab.items()}
        names |= {token.id: token.content for token in self.special}
        found = [int(index) for index in np.asarray(ids).reshape(-1)]
        if unknown := sorted(set(found) - set(names)):
            raise ValueError(f"`tokens(ids=...)`: there is no token {unknown[0]}.")
        return [names[index] for index in found]

    def text(self, ids: Any) -> str:
        """Ids as a text to read; what is no UTF-8, as half a character, becomes U+FFFD.

        `encode` of it need not give the same ids: they may be cut as no text would be.

        >>> vocab = {"a": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
        >>> tokenizer = Tokenizer(vocab, {}, begin=2, end=3, pad=3, unknown=3)
        >>> tokenizer.text([0, 1, 1])
        'ab b'

        Raises:
            ValueError: as `tokens`.
        """
        special = {token.content for token in self.special} | set(MARKS)
        found = b""
        for token in self.tokens(ids):
            if token in special:
                found += token.encode() + b" "
                continue
            letters = token.removesuffix(END_OF_WORD)
            found += b"".join(_BYTE_OF.get(letter, letter.encode()) for letter in letters)
            found += b" " if letters != token else b""
        return found.decode(errors="replace").rstrip(" ")

    def _ids(self, text: str) -> Iterator[int]:
        if not isinstance(text, str):
            raise TypeError(
                f"`tokenizer(text=...)` is a {type(text).__name__}; it takes one string. For "
                "several, call it for each."
            )
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"`tokenizer(text=...)` has the lone surrogate {lone.group()!r}, which is half a "
                "character; read the text as UTF-8."
            )
        raw = {token.content: token.id for token in self.special if not token.normalized}
        late = {_clean(token.content): token.id for token in self.special if token.normalized}
        for part in _cut(text, raw):
            if isinstance(part, int):
                yield part
                continue
            for piece in _cut(_clean(part), late):
                if isinstance(piece, int):
                    yield piece
                    continue
                for word in words(piece):
                    yield from self._pairs(word)

    def _pairs(self, word: str) -> list[int]:
        """Byte-pair encoding of a word: of all neighbours, the least rank first, then the left."""
        letters = [_BYTES[byte] for byte in word.encode()]
        letters[-1] += END_OF_WORD
        ids = [self.vocab.get(letter, self.unknown) for letter in letters]
        following = [*range(1, len(ids)), -1]
        previous = list(range(-1, len(ids) - 1))
        heap: list[tuple[int, int, int]] = []

        def offer(left: int) -> None:
            if left >= 0 and following[left] >= 0:
                found = self.merges.get((ids[left], ids[following[left]]))
                if found is not None:
                    heapq.heappush(heap, (found[0], left, found[1]))

        for place in range(len(ids)):
            offer(place)
        while heap:
            rank, left, joined = heapq.heappop(heap)
            right = following[left]
            # What was offered may be gone: then the pair is another one now.
            if ids[left] < 0 or right < 0:
                continue
            if self.merges.get((ids[left], ids[right])) != (rank, joined):
                continue
            ids[left], ids[right] = joined, -1
            following[left] = following[right]
            if following[left] >= 0:
                previous[following[left]] = left
            offer(previous[left])
            offer(left)
        return [index for index in ids if index >= 0]


def _printable() -> list[str]:
    """A printable character for each byte: itself where it is one, else one from U+0100 on."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


_BYTES = _printable()
_BYTE_OF = {letter: bytes([byte]) for byte, letter in enumerate(_BYTES)}


def _clean(text: str) -> str:
    """NFC, one space for white space, lower case of each character by itself (no final sigma)."""
    spaced = _SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(letter.lower() for letter in spaced)


def _cut(text: str, special: Mapping[str, int]) -> Iterator[str | int]:
    """The text between special tokens, and their ids; of several at one place, the longest."""
    if not special:
        yield text
        return
    longest = sorted(special, key=len, reverse=True)
    start = 0
    for match in re.finditer("|".join(map(re.escape, longest)), text):
        if match.start() > start:
            yield text[start : match.start()]
        yield special[match.group()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def words(text: str) -> Iterator[str]:
    """The words of a cleaned text, by the published pattern.

    It is `'s|'t|'re|'ve|'m|'ll|'d|[letters]+|[number]|[neither, nor space]+`, the first alternative
    that fits at a place.

    >>> list(words("it's 42 ½-baked!?"))
    ['it', "'s", '4', '2', '½', '-', 'baked', '!?']
    """
    place = 0
    while place < len(text):
        if text.startswith(MARKS, place):
            mark = next(mark for mark in MARKS if text.startswith(mark, place))
            yield from (part for part in _MARK_PARTS if part in mark)
            place += len(mark)
            continue
        short = next((end for end in CONTRACTIONS if text.startswith(end, place)), None)
        end = place + (len(short) if short else 1)
        kind = _kind(text[place])
        if short is None and kind in "LO":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != " ":
            yield text[place:end]
        place = end


def _kind(letter: str) -> str:
    """L for a letter, N for a number, O for another character, or a space."""
    if _SPACE.match(letter):
        return " "
    category = unicodedata.category(letter)[0]
    return category if category in "LN" else "O"
