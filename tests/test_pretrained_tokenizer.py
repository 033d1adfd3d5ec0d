"""CLIP's tokenizer: ids against transformers' (and a fixture of them), and hostile files."""

import json
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmh_jax.pretrained import load_tokenizer
from mmh_jax.pretrained.tokenizer import words

HERE = Path(__file__).parent / "data" / "pretrained"
sys.path.insert(0, str(HERE))
import make_tokenizer as making  # noqa: E402

FIXTURE = json.loads((HERE / "tokenizer.json").read_text())
MERGES = [tuple(line.split(" ")) for line in FIXTURE["merges"]]
SIZE = len(making.vocabulary(MERGES))
STYLES = making.styles(SIZE)
BEGIN, END = SIZE - 2, SIZE - 1
PADS = {"sd2": 0, "xl2": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for style, files in STYLES.items():
        found[style] = tmp_path_factory.mktemp(style)
        making.write(found[style], MERGES, files)
    return found


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_fixture(folders, style):
    tokenizer = load_tokenizer(folders[style])
    for text, expected in zip(FIXTURE["texts"], FIXTURE["ids"][style], strict=True):
        found = tokenizer(text)
        assert found.dtype == np.int32
        assert found.shape == (77,)
        padding = [PADS.get(style, END)] * (77 - len(expected))
        assert found.tolist() == expected + padding, text
        inner = tokenizer.encode(text)
        assert inner[:75] == expected[1:-1]
    assert max(map(len, FIXTURE["ids"][style])) == 77  # some texts are cut


def known_to_both(text):
    """Whether Python's table of Unicode and the reference's agree on the text's characters."""
    return not any(
        unicodedata.category(letter) in ("Cn", "Cs")
        or (unicodedata.combining(letter) and not unicodedata.ucd_3_2_0.combining(letter))
        for letter in text
    )


@pytest.fixture(scope="module")
def references(folders):
    transformers = pytest.importorskip("transformers")
    read = transformers.CLIPTokenizer.from_pretrained
    return {style: (read(folder), load_tokenizer(folder)) for style, folder in folders.items()}


def agree(pair, text):
    theirs, ours = pair
    expected = theirs(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert ours(text).tolist() == expected, text


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_transformers_on_a_thousand_texts(references, style):
    texts = FIXTURE["texts"] + making.many_texts(1200)
    for text in texts:
        if known_to_both(text):
            agree(references[style], text)
    assert sum(map(known_to_both, texts)) >= 1000


@settings(max_examples=100, deadline=None)
@given(st.text().filter(known_to_both))
def test_ids_are_those_of_transformers_on_any_text(references, text):
    for pair in references.values():
        agree(pair, text)


def test_every_character_is_cut_as_in_transformers():
    tokenizers = pytest.importorskip("tokenizers")
    letters = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{L}"), "removed")
    numbers = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "removed")
    spaces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s"), "removed")
    known = [chr(code) for code in (*range(0x3000), *range(0x3000, 0x110000, 13))]
    known = [letter for letter in known if unicodedata.category(letter) not in ("Cn", "Cs")]
    text = "".join(known)
    # What is left when one kind is removed, against what our cutting says of each character.
    for kind, theirs in (("L", letters), ("N", numbers), (" ", spaces)):
        kept = "".join(part for part, _ in theirs.pre_tokenize_str(text))
        assert kept == "".join(letter for letter in known if kind_of(letter) != kind)


def kind_of(letter):
    together = list(words(f"a{letter}a"))
    if together == [f"a{letter}a"]:
        return "L"
    if together == ["a", "a"]:
        return " "
    return "N" if len(list(words(letter * 2))) == 2 else "O"


def test_the_least_rank_goes_first_and_then_the_left(tmp_path):
    vocab = [
        "a",
        "b",
        "c</w>",
        "ab",
        "bc</w>",
        "abc</w>",
        "aa",
        "a</w>",
        "aa</w>",
        "<|startoftext|>",
    ]
    ids = {token: index for index, token in enumerate([*vocab, "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    merges = ["b c</w>", "a b", "a bc</w>", "a a", "a a</w>"]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokens(tokenizer.encode("abc aaa aaaa aba")) == (
        ["abc</w>", "aa", "a</w>", "aa", "aa</w>", "ab", "a</w>"]
    )
    assert tokenizer.tokens(tokenizer.encode("xa")) == ["<|endoftext|>", "a</w>"]  # unknown
    with pytest.raises(ValueError, match="no token 99"):
        tokenizer.tokens([99])


def test_a_long_word_costs_little_more_than_its_length(folders):
    tokenizer = load_tokenizer(folders["plain"])
    assert len(tokenizer.encode("stars" * 4_000)) < 20_000
    assert tokenizer("cat " * 10**5).tolist()[-1] == END  # read no further than needed


@pytest.mark.parametrize("text", [None, b"cat", ["a", "b"], 3])
def test_only_a_string_is_text(folders, text):
    with pytest.raises(TypeError, match="one string"):
        load_tokenizer(folders["plain"])(text)


def test_half_a_character_is_no_text(folders):
    with pytest.raises(ValueError, match="surrogate"):
        load_tokenizer(folders["plain"])("a\ud800")


FAULTS = [  # file, content, what the message names
    ("vocab.json", None, "vocab.json.* does not exist"),
    ("merges.txt", None, "merges.txt.* does not exist"),
    ("vocab.json", b"[1, 2]", "no JSON object, but a list"),
    ("vocab.json", b'{"a": ', "no JSON object"),
    ("vocab.json", b"[" * 200_000, "no JSON object"),
    ("vocab.json", b'{"a": -1}', "'a' the id -1"),
    ("vocab.json", b'{"a": true}', "'a' the id True"),
    ("vocab.json", b'{"a": 1.5}', "'a' the id 1.5"),
    ("vocab.json", b'{"a": "0"}', "'a' the id '0'"),
    ("vocab.json", b'{"a": 99999999999999999999}', "id 99999999999999999999"),
    ("vocab.json", b'{"a": 1, "b": 1}', "same id"),
    ("vocab.json", b"\xff\xfe", "no JSON object"),
    ("merges.txt", b"\xff\xfe", "not UTF-8"),
    ("merges.txt", b"#version: 0.2\na b c\n", "'a b c' in line 2"),
    ("merges.txt", b"#version: 0.2\n\n", "'' in line 2"),
    ("merges.txt", b"a \xe2\x82\xac\n", "'€' in line 1, which is not in vocab.json"),
    ("merges.txt", b"~ ~\n", "'~~' in line 1, which is not in vocab.json"),
    ("tokenizer_config.json", b"3", "but a int"),
    ("tokenizer_config.json", b'{"do_lower_case": false}', "do_lower_case False.*Only True"),
    ("tokenizer_config.json", b'{"padding_side": "left"}', "padding_side 'left'"),
    ("tokenizer_config.json", b'{"pad_token": "nowhere"}', "'nowhere', which is not in vocab.json"),
    ("tokenizer_config.json", b'{"pad_token": 3}', "the token 3, which has no"),
    ("tokenizer_config.json", b'{"pad_token": {"content": ""}}', "has no content"),
    ("tokenizer_config.json", b'{"pad_token": {"content": "!", "lstrip": true}}', "lstrip"),
    ("tokenizer_config.json", b'{"model_max_length": 1}', "model_max_length 1"),
    ("tokenizer_config.json", b'{"model_max_length": "77"}', "model_max_length '77'"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "!"}}', "no table of ids"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "!"}}', "'!' the id 5.*It is 0"),
    ("added_tokens.json", b'{"<new>": 3}', "'<new>' the id 3"),
    ("added_tokens.json", b'{"<new>": "3"}', "no whole number"),
    (
        "special_tokens_map.json",
        b'{"eos_token": "nowhere"}',
        "'nowhere', which is not in vocab.json",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    making.write(tmp_path, MERGES, {})
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    kind = FileNotFoundError if content is None else ValueError
    with pytest.raises(kind, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    making.write(tmp_path, MERGES, {})
    with (tmp_path / "vocab.json").open("wb") as file:
        file.truncate(10 * 2**30)  # sparse
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than"):
        load_tokenizer(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["vocab.json", "merges.txt", "tokenizer_config.json"]),
    st.binary(max_size=60) | st.text(max_size=60).map(str.encode),
    st.integers(0, 10**6),
)
def test_a_damaged_file_gives_a_clear_error_or_a_tokenizer(tmp_path_factory, name, noise, at):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    making.write(folder, MERGES[:40], STYLES["sd1"])
    path = folder / name
    content = path.read_bytes()
    at %= len(content) + 1
    path.write_bytes(content[:at] + noise + content[at + len(noise) :])
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        assert str(folder) in str(error)  # noqa: PT017
    else:
        assert tokenizer("a photograph").shape == (tokenizer.max_length,)


# All in one file, as newer versions of transformers write it


def whole(folder, pairs=True, **changes):
    """`tokenizer.json` in the place of `vocab.json` and `merges.txt`."""
    vocab = making.vocabulary(MERGES)
    merges = [list(pair) if pairs else " ".join(pair) for pair in MERGES]
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
    added = [
        {"id": vocab[token], "content": token, "normalized": "start" in token, "special": True}
        for token in ("<|startoftext|>", "<|endoftext|>")
    ]
    content = {"model": model | changes.pop("model", {}), "added_tokens": added} | changes
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    return folder


@pytest.mark.parametrize("pairs", [True, False])
def test_one_file_is_read_as_the_two(folders, tmp_path, pairs):
    one, two = load_tokenizer(whole(tmp_path, pairs)), load_tokenizer(folders["sd1"])
    for text in making.TEXTS:
        np.testing.assert_array_equal(one(text), two(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no JSON object|is not of a byte-pair encoding"),
        ({"model": {"type": "Unigram"}}, "is not of a byte-pair encoding"),
        ({"model": {"end_of_word_suffix": ""}}, "is not of a byte-pair encoding"),
        ({"model": {"vocab": []}}, "has no vocabulary and merges"),
        ({"model": {"merges": [["a"], 3]}}, "where two tokens should be"),
        ({"added_tokens": [1]}, "no list of tokens"),
        ({"added_tokens": [{"content": "x"}]}, "no whole number"),
    ],
)
def test_a_wrong_file_of_all_is_refused(tmp_path, changes, message):
    folder = whole(tmp_path, **{k: v for k, v in changes.items() if v is not None})
    if changes.get("model", 0) is None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": None}))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


def test_what_transformers_writes_now_is_read(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPTokenizer.from_pretrained(folders["sd1"]).save_pretrained(tmp_path)
    if (tmp_path / "vocab.json").exists():
        pytest.skip("this version writes vocab.json")
    one, two = load_tokenizer(tmp_path), load_tokenizer(folders["sd1"])
    for text in making.TEXTS:
        np.testing.assert_array_equal(one(text), two(text))
