"""Reading published folders: what is right is read, what is wrong is named, nothing is executed."""

import json
import os
import pickle

import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mmh_jax import pretrained
from mmh_jax.pretrained import files, layers, weights

RNG = np.random.default_rng(0)
STEM = "diffusion_pytorch_model"


def some_arrays():
    return {
        "a.weight": RNG.normal(size=(3, 2)).astype(np.float32),
        "a.bias": np.arange(3, dtype=np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "one": np.array(2.5, np.float64),
        "odd": np.arange(3, dtype=np.uint8),
        "truth": np.array([True, False]),
    }


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_writes(tmp_path):
    arrays = some_arrays()
    save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    found = pretrained.open_safetensors(tmp_path / "x.safetensors", caller="load")
    assert found.metadata == {"format": "pt"}
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert array.size == 0 or not found[name].flags.writeable
    with pytest.raises(KeyError):
        found["b"]


def test_reads_bfloat16_at_any_offset(tmp_path):
    data = np.array([1.0, -2.5], jnp.bfloat16).tobytes()
    header = {"u": entry("U8", (1,), (0, 1)), "b": entry("BF16", (2,), (1, 5))}
    (tmp_path / "x.safetensors").write_bytes(raw(header, b"\x07" + data))
    found = pretrained.open_safetensors(tmp_path / "x.safetensors", caller="load")
    np.testing.assert_array_equal(found["b"].astype(np.float32), [1.0, -2.5])


BAD = {
    "empty": (b"", "truncated"),
    "seven": (b"\0" * 7, "truncated"),
    "ten gigabytes": (raw({}, length=10 * 2**30), "claims a header of 10,737,418,240"),
    "all ones": (b"\xff" * 64, "claims a header of 18,446"),
    "short header": (raw({}, length=3), "claims a header of 3"),
    "no json": (raw(b"{,}"), "damaged header"),
    "no utf-8": (raw(b"\xff\xfe"), "damaged header"),
    "list": (raw([1]), "but a list"),
    "nested": (raw(b"[" * 100_000), "damaged header"),
    "long number": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "damaged header"),
    "twice": (raw(b'{"a": 1, "a": 2}'), "'a' is there twice"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}), "data_offsets for 'a'"),
    "more fields": (raw({"a": entry() | {"x": 1}}, b"\0" * 8), "data_offsets for 'a'"),
    "no object": (raw({"a": 3}), "data_offsets for 'a'"),
    "unknown dtype": (raw({"a": entry("F8_E4M3")}, b"\0" * 8), "'F8_E4M3'"),
    "dtype a list": (raw({"a": entry([])}, b"\0" * 8), r"as \[\]"),
    "shape of text": (raw({"a": entry(shape="2")}, b"\0" * 8), "shape"),
    "negative shape": (raw({"a": entry(shape=(-1, -2))}, b"\0" * 8), "shape"),
    "true": (raw({"a": entry(shape=(True, 2))}, b"\0" * 8), "shape"),
    "half": (raw({"a": entry(shape=(2.0,))}, b"\0" * 8), "shape"),
    "many axes": (raw({"a": entry(shape=[1] * 99)}, b"\0" * 8), "shape"),
    "overflow": (raw({"a": entry(shape=(2**62, 4, 2))}, b"\0" * 8), "takes 147,573"),
    "one offset": (raw({"a": entry(offsets=(0,))}, b"\0" * 8), "offsets"),
    "negative": (raw({"a": entry(offsets=(-8, 0))}, b"\0" * 8), "offsets"),
    "backwards": (raw({"a": entry(offsets=(8, 0))}, b"\0" * 8), "second is smaller"),
    "truncated": (raw({"a": entry()}, b"\0" * 7), "truncated: 'a' ends at byte"),
    "wrong size": (raw({"a": entry(shape=(3,))}, b"\0" * 8), "takes 12"),
    "small shape": (raw({"a": entry(shape=(1,))}, b"\0" * 8), "takes 4"),
    "overlap": (
        raw({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "'b' overlap with 'a'"
    ),
    "gap": (raw({"a": entry(), "b": entry(offsets=(9, 17))}, b"\0" * 17), "gap between 'a' and"),
    "rest": (raw({"a": entry()}, b"\0" * 9), "1 bytes after"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (raw({"__metadata__": [1]}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_says_what_is_wrong_with_a_file(case, tmp_path):
    content, match = BAD[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as info:
        pretrained.open_safetensors(path, caller="load")
    assert str(path) in str(info.value)
    assert len(str(info.value)) < 1500


def test_a_large_file_with_a_large_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # sparse: takes no disk
        file.write((3 * 2**30).to_bytes(8, "little"))
        file.truncate(4 * 2**30)
    with pytest.raises(ValueError, match="above 8,388,608"):
        pretrained.open_safetensors(path, caller="load")


def write_shards(folder, where=None, **contents):
    for name, arrays in contents.items():
        save_file(arrays, folder / f"{name}.safetensors")
    if where is None:
        where = {key: f"{name}.safetensors" for name, value in contents.items() for key in value}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


A, B = {"a": np.ones(2, np.float32)}, {"b": np.zeros(3, np.float32)}


def test_reads_shards(tmp_path):
    write_shards(tmp_path, one=A, two=B)
    found = pretrained.open_weights(tmp_path, caller="load")
    assert set(found) == {"a", "b"}
    np.testing.assert_array_equal(found["a"], A["a"])
    np.testing.assert_array_equal(found["b"], B["b"])
    assert "2 in 2 files" in repr(found)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"a": "../one.safetensors", "b": "two.safetensors"}, "no plain name"),
        ({"a": "/etc/passwd", "b": "two.safetensors"}, "no plain name"),
        ({"a": "..", "b": "two.safetensors"}, "no plain name"),
        ({"a": "C:\\one.safetensors"}, "no plain name"),
        ({"a": "one.safetensors\0.txt"}, "no plain name"),
        ({"a": ""}, "no plain name"),
        ({"a": "x" * 300}, "no plain name"),
        ({"a": 3}, "no `weight_map`"),
        (["a"], "no `weight_map`"),
        ({"a": "one.bin"}, "pickle"),
        ({"a": "one.txt"}, "no safetensors file"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "lists in vain 'b'"),
        ({"b": "two.safetensors", "a": "two.safetensors"}, "lists in vain 'a'"),
    ],
)
def test_says_what_is_wrong_with_an_index(where, match, tmp_path):
    write_shards(tmp_path, where, one=A, two=B)
    with pytest.raises(ValueError, match=match):
        pretrained.open_weights(tmp_path, caller="load")


def test_an_index_must_list_all_of_a_shard_and_find_every_shard(tmp_path):
    write_shards(tmp_path, {"a": "one.safetensors"}, one=A | B)
    with pytest.raises(ValueError, match="does not list 'b'"):
        pretrained.open_weights(tmp_path, caller="load")
    write_shards(tmp_path, {"a": "three.safetensors"})
    with pytest.raises(FileNotFoundError, match="three"):
        pretrained.open_weights(tmp_path, caller="load")


def test_links_may_not_leave_the_folder(tmp_path):
    inside, outside = tmp_path / "model", tmp_path / "elsewhere"
    inside.mkdir(), outside.mkdir()
    save_file(A, outside / "x.safetensors")
    os.symlink(outside / "x.safetensors", inside / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match="leads out"):
        pretrained.open_weights(inside, caller="load")
    os.unlink(inside / f"{STEM}.safetensors")
    save_file(A, inside / "real.safetensors")
    os.symlink(inside / "real.safetensors", inside / f"{STEM}.safetensors")
    assert set(pretrained.open_weights(inside, caller="load")) == {"a"}
    os.symlink(inside / "self.json", inside / "self.json")
    with pytest.raises(ValueError, match=r"broken|leads out"):
        files.within(inside, "self.json", caller="load")


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path):
    unet = tmp_path / "models--x" / "snapshots" / "0a1b" / "unet"
    blobs = tmp_path / "models--x" / "blobs"
    unet.mkdir(parents=True), blobs.mkdir()
    save_file(A, blobs / "c0ffee")
    os.symlink("../../../blobs/c0ffee", unet / f"{STEM}.safetensors")
    assert set(pretrained.open_weights(unet, caller="load")) == {"a"}
    save_file(A, tmp_path / "secret")
    os.symlink(tmp_path / "secret", unet / "y.safetensors")
    with pytest.raises(ValueError, match="leads out"):
        files.within(unet, "y.safetensors", caller="load")


class Trap:
    def __reduce__(self):
        return (os._exit, (3,))


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", "x.PT", "x.pkl"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    for call in (
        lambda: pretrained.open_weights(tmp_path, caller="load"),
        lambda: pretrained.open_safetensors(tmp_path / name, caller="load"),
    ):
        with pytest.raises(ValueError, match=r"pickle.*save_file"):
            call()
    (tmp_path / name).rename(tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        pretrained.open_weights(tmp_path, caller="load")


def test_variants(tmp_path):
    save_file(A, tmp_path / f"{STEM}.fp16.safetensors")
    assert set(pretrained.open_weights(tmp_path, caller="load", variant="fp16")) == {"a"}
    with pytest.raises(FileNotFoundError, match=r"fp16\.safetensors'; name its variant"):
        pretrained.open_weights(tmp_path, caller="load")
    with pytest.raises(ValueError, match="no plain name"):
        pretrained.open_weights(tmp_path, caller="load", variant="/../x")
    with pytest.raises(FileNotFoundError, match="Copy it there"):
        pretrained.open_weights(tmp_path / "none", caller="load")


def test_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pretrained.read_json(path, caller="load")
    path.write_text('{"a": [1, 2.5, null]}')
    assert pretrained.read_json(path, caller="load") == {"a": [1, 2.5, None]}
    for content, match in (
        ("[1]", "a list"), ("{", "no JSON"), ("[" * 10**6, "no JSON"), ('{"a":1,"a":2}', "twice"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match=match):
            pretrained.read_json(path, caller="load")
    path.write_text(" " * 100 + "{}")
    with pytest.raises(ValueError, match="more than 64 bytes"):
        pretrained.read_json(path, caller="load", max_bytes=64)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.convs = nnx.List([layers.Nothing(), layers.Conv(2, 4, size=3, rngs=rngs)])
        self.norm = layers.GroupNorm(2, 4)
        self.out = layers.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(self.convs[1](x)))


def build():
    return Pair(nnx.Rngs(0))


def test_round_trip_and_published_layout(tmp_path):
    network = build()
    path = tmp_path / f"{STEM}.safetensors"
    pretrained.save(path, network)
    written = load_file(path)
    assert {name: array.shape for name, array in written.items()} == pretrained.layout(network)
    assert written["convs.1.weight"].shape == (4, 2, 3, 3)
    np.testing.assert_array_equal(
        written["convs.1.weight"][3, 1, 0, 2], network.convs[1].weight[0, 2, 1, 3]
    )
    again = pretrained.restore(
        build, pretrained.open_weights(tmp_path, caller="load"), caller="load"
    )
    x = jnp.asarray(RNG.normal(size=(4, 4, 2)), jnp.float32)
    np.testing.assert_array_equal(again(x), network(x))
    half = pretrained.restore(build, written, caller="load", dtype="bfloat16")
    assert half(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(half(x).astype(jnp.float32), network(x), atol=0.05)
    pretrained.save(path, half)
    found = pretrained.open_weights(tmp_path, caller="load")
    assert {found[name].dtype for name in found} == {jnp.dtype("bfloat16")}
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_what_does_not_fit_is_listed():
    tensors = pretrained.flatten(build())
    missing = {name: tensors[name] for name in tensors if not name.startswith("norm")}
    missing |= {f"more.{i}": np.zeros(1, np.float32) for i in range(12)}
    missing["out.bias"] = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="does not fit") as info:
        pretrained.restore(build, missing, caller="load", path="unet/x.safetensors")
    text = str(info.value)
    assert "2 tensors are missing: norm.bias, norm.weight" in text
    assert "12 are not of this network: more.0, more.1," in text
    assert "and 2 more" in text
    assert "out.bias has shape (4,) instead of (3,)" in text
    assert "unet/x.safetensors" in text
    with pytest.raises(TypeError, match=r"out\.bias is of dtype int8"):
        pretrained.restore(build, tensors | {"out.bias": np.zeros(3, np.int8)}, caller="load")
    with pytest.raises(ValueError, match="dtype='int8'"):
        pretrained.restore(build, tensors, caller="load", dtype="int8")


def test_old_names():
    tensors = pretrained.flatten(build())
    old = {name.replace("out.", "proj."): array for name, array in tensors.items()}
    old["position_ids"] = np.arange(3)

    def rename(name):
        return None if name == "position_ids" else name.replace("proj.", "out.")

    x = jnp.ones((2, 2, 2))
    found = pretrained.restore(build, old, caller="load", rename=rename)
    np.testing.assert_array_equal(found(x), build()(x))
    with pytest.raises(ValueError, match=r"both 'out\..* and 'proj\."):
        pretrained.restore(build, old | tensors, caller="load", rename=rename)


def test_placing_sees_every_parameter_once():
    seen = []

    def place(name, array):
        seen.append((name, array.shape))
        return jnp.asarray(array)

    pretrained.restore(build, pretrained.flatten(build()), caller="load", place=place)
    assert dict(seen)["convs.1.weight"] == (3, 3, 2, 4)
    assert sorted(name for name, _ in seen) == sorted(weights.layout(build()))


# Fuzzing: whatever the bytes, an error of ours or the tensors, in bounded time and memory.  For
# ten minutes of it: MMH_JAX_FUZZ_EXAMPLES=30000 pytest -k fuzz tests/test_pretrained_files.py

EXAMPLES = int(os.environ.get("MMH_JAX_FUZZ_EXAMPLES", "60"))
FUZZED = settings(max_examples=EXAMPLES, deadline=None)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One folder for all examples."""
    return tmp_path_factory.mktemp("fuzz")


def opened(path):
    """Open and read all; an error that is not ours fails the test."""
    try:
        found = pretrained.open_safetensors(path, caller="load")
    except ValueError as error:
        assert str(error).startswith("`load(path=")  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
        return None
    total = sum(found[name].nbytes for name in found)
    assert total <= path.stat().st_size
    return found


@FUZZED
@given(data=st.data())
def test_fuzz_damaged_files(data, scratch):
    path = scratch / "x.safetensors"
    arrays = some_arrays()
    save_file(arrays, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "set"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            content[place] = data.draw(st.sampled_from(b'{}[],:"0919-\\\xff\x00'))
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=9))
        elif place:
            del content[place:]
    path.write_bytes(content)
    opened(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
SIZES = st.integers(-1, 12) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F64", "F8_E5M2"]) | JSON,
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    },
    optional={"more": JSON},
)


@FUZZED
@given(
    header=st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4) | JSON,
    data=st.binary(max_size=32),
    length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 64),
)
def test_fuzz_hostile_headers(header, data, length, scratch):
    path = scratch / "x.safetensors"
    path.write_bytes(raw(header, data, length))
    found = opened(path)
    if found is not None:  # what is accepted has exactly the bytes after the header it claims
        content = path.read_bytes()
        claimed = int.from_bytes(content[:8], "little")
        assert sum(found[name].nbytes for name in found) == len(content) - 8 - claimed


def test_a_header_may_end_in_spaces(tmp_path):
    """As published writers align it."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({}, b" ", 3))
    assert len(pretrained.open_safetensors(path, caller="load")) == 0


@FUZZED
@given(
    where=st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["one.safetensors", "two.safetensors", "../one.safetensors", "/x", "."])
        | st.text(max_size=12),
        max_size=3,
    )
    | JSON
)
def test_fuzz_hostile_indices(where, scratch):
    folder = scratch
    write_shards(folder, where, one=A, two=B)
    try:
        found = pretrained.open_weights(folder, caller="load")
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith("`load(path=")  # noqa: PT017
        return
    for name in found:
        np.testing.assert_array_equal(found[name], (A | B)[name])


NAMES = {
    name for members in cases.FAMILIES.values() for config in members.values() for name in config
}
NAMES = sorted(NAMES | {"attention_head_dim", "only_cross_attention", "more"})
PREFIXES = ("`UNet2D", "`AutoencoderKL", "`GroupNorm", "`Conv", "`Linear", "`Embedding")
VALUES = (
    JSON
    | SIZES
    | st.lists(SIZES, max_size=3)
    | st.sampled_from([[8, 8], [0, 8], [8, 10**6], [[1], [1]], 0, 1, -1, 0.5, "DownBlock2D"])
)


@settings(max_examples=max(15, EXAMPLES // 10), deadline=None)
@given(
    family=st.sampled_from(list(cases.FAMILIES)),
    change=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=2),
    data=st.data(),
)
def test_fuzz_hostile_configurations(family, change, data):
    case = data.draw(st.sampled_from(sorted(cases.FAMILIES[family])))
    kind = getattr(pretrained, cases.CLASSES[family])
    try:
        found = pretrained.abstract(
            lambda: kind(cases.FAMILIES[family][case] | change, rngs=nnx.Rngs(0))
        )
    except (ValueError, TypeError) as error:
        assert str(error).startswith(PREFIXES)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
    else:
        assert all(min(shape) > 0 for shape in pretrained.layout(found).values())
