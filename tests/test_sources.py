import gzip
import io
import os
import struct
import zipfile

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from mmh_jax.data import files
from mmh_jax.data.sources import load

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (5, 4, 3), np.uint8)
FLOATS = RNG.normal(size=(6, 7))


def idx(array: np.ndarray) -> bytes:
    types = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    header = struct.pack(">BBBB", 0, 0, types[array.dtype.str[1:]], array.ndim)
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return header + shape + array.astype(array.dtype.newbyteorder(">")).tobytes()


def save_images(folder, images, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02}{suffix}")
    return folder


def message(path, error=ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        load(path, **options)
    text = str(caught.value)
    assert text.startswith("`load(")  # names the argument
    assert text.endswith(".")  # and ends with a cure
    assert text.count(". ") + text.count("; ") >= 1
    return text


# What can be read


def test_digits():
    source = load("digits")
    assert source.points.shape == (1797, 8, 8)
    assert source.points.dtype == np.float32
    assert source.points.max() == 1
    assert source.name == "digits"
    assert source.is_image
    assert source.value_range == (0, 1)
    # the first digit of the set is a 0: a ring with an empty middle
    assert source.labels[0] == 0
    assert source.points[0, 4, 3] == 0
    assert source.points[0, 4, 1] == 5 / 16


@pytest.mark.parametrize("kind", ["npy", "npz", "idx", "idx.gz", "folder"])
def test_bytes_are_the_same_from_every_kind_of_source(tmp_path, kind):
    path = tmp_path / f"set.{kind}"
    if kind == "npy":
        np.save(path, BYTES)
    elif kind == "npz":
        np.savez_compressed(path, BYTES)
    elif kind == "idx":
        path.write_bytes(idx(BYTES))
    elif kind == "idx.gz":
        path.write_bytes(gzip.compress(idx(BYTES), mtime=0))
    else:
        save_images(path, BYTES)
    source = load(path)
    np.testing.assert_array_equal(source.points, BYTES / np.float32(255))
    assert source.points.dtype == np.float32
    assert source.is_image
    assert source.value_range == (0, 1)
    assert source.labels is None
    assert source.name == ("set.folder" if kind == "folder" else "set")
    np.testing.assert_array_equal(load(path, max_points=3).points, source.points[:3])
    np.testing.assert_array_equal(load(path, max_points=100).points, source.points)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
def test_floats_are_taken_as_they_are(tmp_path, dtype):
    np.save(tmp_path / "a.npy", FLOATS.astype(dtype))
    source = load(str(tmp_path / "a.npy"))
    np.testing.assert_array_equal(source.points, FLOATS.astype(dtype).astype(np.float32))
    assert source.points.dtype == np.float32
    assert not source.is_image
    assert source.value_range == (source.points.min(), source.points.max())


@pytest.mark.parametrize(
    ("shape", "scale", "is_image"),
    [
        ((3, 8, 8), 1, True),
        ((3, 8, 8, 3), 1, True),
        ((3, 8, 8), 2, False),
        ((3, 8, 8, 5), 1, False),
    ],
)
def test_float_arrays_are_pictures_by_shape_and_range(tmp_path, shape, scale, is_image):
    np.save(tmp_path / "a.npy", scale * RNG.uniform(size=shape))
    source = load(tmp_path / "a.npy")
    assert source.is_image == is_image
    assert (source.value_range == (0, 1)) == is_image


@pytest.mark.parametrize("key", ["points", "images", "x"])
def test_npz_keys_and_labels(tmp_path, key):
    labels = np.arange(6)
    np.savez(tmp_path / "a.npz", other=np.zeros(3), y=labels, **{key: FLOATS})
    source = load(tmp_path / "a.npz", max_points=4)
    np.testing.assert_array_equal(source.points, FLOATS[:4].astype(np.float32))
    np.testing.assert_array_equal(source.labels, labels[:4])


def test_npz_with_one_array_of_any_name(tmp_path):
    np.savez(tmp_path / "a.npz", y=FLOATS)
    source = load(tmp_path / "a.npz")
    assert source.points.shape == FLOATS.shape
    assert source.labels is None


@pytest.mark.filterwarnings("ignore:.*published")
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_labels_beside(tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx(BYTES)))
    assert load(path).labels is None
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    source = load(path, max_points=4)
    np.testing.assert_array_equal(source.labels, labels[:4])
    assert source.name == "train-images-idx3-ubyte"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_idx_floats_are_big_endian(tmp_path, dtype):
    (tmp_path / "a.idx").write_bytes(idx(FLOATS.astype(dtype)))
    np.testing.assert_array_equal(load(tmp_path / "a.idx").points, FLOATS.astype(np.float32))


def test_folder_in_colour_sorted_and_selective(tmp_path):
    images = RNG.integers(0, 256, (3, 4, 5, 3), np.uint8)
    save_images(tmp_path, images[::-1])
    for old, new in (("00", "c"), ("01", "b"), ("02", "a")):
        os.rename(tmp_path / f"{old}.png", tmp_path / f"{new}.PNG")
    (tmp_path / "README.txt").write_text("not an image")
    (tmp_path / "._a.png").write_text("what some systems leave behind")
    (tmp_path / "d.png").mkdir()
    source = load(tmp_path)
    np.testing.assert_array_equal(source.points, images / np.float32(255))
    assert source.is_image


def test_palettes_and_transparency(tmp_path):
    """A palette image is in colour; what is transparent shows white."""
    colours = np.zeros((4, 4, 4), np.uint8)
    colours[..., 0], colours[:2, :, 3] = 200, 255
    expected = np.where(colours[..., 3:] == 255, [200, 0, 0], [255, 255, 255])
    Image.fromarray(colours).save(tmp_path / "a.png")
    Image.fromarray(colours).quantize().save(tmp_path / "b.png")
    Image.fromarray(expected.astype(np.uint8)).quantize().save(tmp_path / "c.png")
    Image.fromarray(np.ascontiguousarray(colours[::-1])).save(tmp_path / "d.png")
    points = load(tmp_path).points * 255
    for point in points[:3]:
        np.testing.assert_allclose(point, expected, atol=1e-3)
    np.testing.assert_allclose(points[3], expected[::-1], atol=1e-3)


def test_grey_with_transparency_stays_grey(tmp_path):
    grey = np.array([[[100, 255], [100, 0]], [[7, 255], [0, 255]]], np.uint8)
    Image.fromarray(grey, "LA").save(tmp_path / "a.png")
    Image.fromarray(np.eye(2, dtype=bool)).save(tmp_path / "b.png")
    points = load(tmp_path).points * 255
    np.testing.assert_allclose(points[0], [[100, 255], [7, 0]], atol=1e-3)
    np.testing.assert_allclose(points[1], 255 * np.eye(2), atol=1e-3)


# What is refused, and in which words


def test_missing_path(tmp_path):
    text = message(tmp_path / "none.npy", FileNotFoundError)
    assert "none.npy" in text
    assert "does not exist" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"1,2\n3,4\n"),
        ("a.pt", b"PK\x03\x04"),
        ("a.gz", gzip.compress(b"x" * 99, mtime=0)),
        ("a.gz", b"\x1f\x8bnot really"),
        ("a", b""),
        ("a.png", b"\x89PNG"),
    ],
)
def test_unknown_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    text = message(tmp_path / name)
    assert "unknown kind" in text
    assert ("folder that holds them" in text) == (name == "a.png")


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "unknown kind" in message(tmp_path / "pipe")


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "deeper").mkdir()
    save_images(tmp_path / "deeper" / "still", BYTES)
    assert "without images" in message(tmp_path)


def test_mixed_images(tmp_path):
    save_images(tmp_path, [BYTES[0], BYTES[1], BYTES[2].T.copy()])
    text = message(tmp_path)
    assert "'00.png' is 4 x 3 grey, '02.png' is 3 x 4 grey" in text
    Image.fromarray(BYTES[0]).convert("RGB").save(tmp_path / "02.png")
    assert "'02.png' is 4 x 3 colour" in message(tmp_path)
    assert len(load(tmp_path, max_points=2).points) == 2


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_unreadable_image(tmp_path, suffix):
    noise = RNG.integers(0, 256, (64, 64), np.uint8)
    save_images(tmp_path, [noise, noise], suffix)
    path = tmp_path / f"01{suffix}"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        text = message(tmp_path)
        assert "cannot be read as an image" in text
        assert str(path) in text


def test_damaged_png(tmp_path):
    noise = RNG.integers(0, 256, (300, 300), np.uint8)
    save_images(tmp_path, [noise, noise])
    path = tmp_path / "01.png"
    whole = bytearray(path.read_bytes())
    for place in (40, 5000, whole.index(b"IDAT", 100), len(whole) - 20):
        content = whole.copy()
        content[place : place + 4] = b"?!?!"
        path.write_bytes(content)
        assert "cannot be read as an image" in message(tmp_path)


def test_encrypted_archive(tmp_path):
    np.savez(tmp_path / "a.npz", FLOATS)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[6] |= 1  # the flag in the member's own header, then the one in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "encrypted" in message(tmp_path / "a.npz")


def test_postscript_in_disguise_is_not_run(tmp_path, monkeypatch):
    def run(*args):
        pytest.fail("the file was handed to another program")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    save_images(tmp_path, BYTES)
    buffer = io.BytesIO()
    Image.fromarray(BYTES[0]).save(buffer, "EPS")
    (tmp_path / "01.png").write_bytes(buffer.getvalue())
    assert "cannot be read as an image" in message(tmp_path)


def test_sixteen_bit_image(tmp_path):
    save_images(tmp_path, [BYTES[0].astype(np.uint16)] * 2)
    assert "more than 8 bits" in message(tmp_path)


def test_image_of_too_many_pixels(tmp_path, monkeypatch):
    save_images(tmp_path, BYTES)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    text = message(tmp_path)
    assert "cannot be read as an image" in text
    assert "decompression bomb" in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_nan_and_infinite_values(tmp_path, value):
    array = FLOATS.copy()
    array[2, 1] = array[2, 3] = array[4, 0] = value
    np.save(tmp_path / "a.npy", array)
    text = message(tmp_path / "a.npy")
    assert "3 values" in text
    assert "in 2 of 6 rows, row 2 the first" in text


def test_constant(tmp_path):
    np.save(tmp_path / "a.npy", np.broadcast_to(FLOATS[0], (4, 7)))
    assert "constant" in message(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, bool, complex, "U3"])
def test_units_that_are_not_known(tmp_path, dtype):
    np.save(tmp_path / "a.npy", BYTES.astype(dtype))
    text = message(tmp_path / "a.npy")
    assert "dtype" in text
    assert "float32" in text


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_idx_integers_that_are_not_bytes(tmp_path, dtype):
    (tmp_path / "a").write_bytes(idx(BYTES.astype(dtype)))
    assert "dtype" in message(tmp_path / "a")


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_are_not_loaded(tmp_path):
    trap = tmp_path / "sprung"
    array = np.array([Bomb(trap), Bomb(trap)], object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", points=array, allow_pickle=True)
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes()[128:])
    for name in ("a.npy", "a.npz", "b.npy"):
        assert "Python objects" in message(tmp_path / name)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.idx", "a.idx.gz"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, name, fraction):
    array = RNG.integers(0, 256, (40, 40, 3), np.uint8)
    path = tmp_path / name
    if ".idx" in name:
        content = idx(array)
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    else:
        (np.save if name == "a.npy" else np.savez)(path, array)
    whole = path.read_bytes()
    assert len(load(path).points) == 40
    path.write_bytes(whole[: int(fraction * len(whole))])
    text = message(path)
    assert "truncated" in text
    assert "rite it again" in text or "Write numbers" in text


def test_truncated_within_the_header(tmp_path):
    (tmp_path / "a.idx").write_bytes(idx(BYTES)[:9])
    assert "truncated" in message(tmp_path / "a.idx")
    (tmp_path / "a.npy").write_bytes(b"")
    assert "truncated" in message(tmp_path / "a.npy")


@pytest.mark.parametrize("levels", [256, 4])
def test_damaged_gzip(tmp_path, levels):
    """Noise is stored as it is, and only the checksum tells; few grey levels are compressed."""
    array = np.random.default_rng(0).integers(0, levels, (40, 40, 3), np.uint8)
    content = bytearray(gzip.compress(idx(array), mtime=0))
    content[600:700] = bytes(255 - byte for byte in content[600:700])
    (tmp_path / "a.gz").write_bytes(content)
    assert "damaged" in message(tmp_path / "a.gz")


def test_idx_longer_than_its_header_says(tmp_path):
    (tmp_path / "a.idx").write_bytes(idx(BYTES) + b"0")
    assert "longer" in message(tmp_path / "a.idx")


def test_another_format_under_the_wrong_name(tmp_path):
    np.savez(tmp_path / "b.npz", BYTES)
    (tmp_path / "a.npy").write_bytes((tmp_path / "b.npz").read_bytes())
    np.save(tmp_path / "c.npy", BYTES)
    (tmp_path / "a.npz").write_bytes((tmp_path / "c.npy").read_bytes())
    assert "no .npy file" in message(tmp_path / "a.npy")
    assert "no .npz file" in message(tmp_path / "a.npz")


def test_npz_without_a_known_key(tmp_path):
    np.savez(tmp_path / "a.npz", b=FLOATS, a=FLOATS)
    text = message(tmp_path / "a.npz")
    assert "['a', 'b']" in text
    assert "key `points`" in text
    np.savez(tmp_path / "a.npz")
    assert "holds the arrays []" in message(tmp_path / "a.npz")


def test_npz_with_something_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("points", b"import os")
    assert "shape ()" in message(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.idx.gz"])
def test_files_that_unpack_without_limit(tmp_path, monkeypatch, name):
    zeros = np.zeros((1000, 1000), np.uint8)
    if name == "a.npz":
        np.savez_compressed(tmp_path / name, zeros)
    else:
        (tmp_path / name).write_bytes(gzip.compress(idx(zeros), mtime=0))
    assert "constant" in message(tmp_path / name)
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 10**5)
    text = message(tmp_path / name)
    assert "unpacks to" in text
    assert ".npy" in text


def test_a_header_that_promises_the_moon_takes_no_memory(tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((2, 2), np.float32))
    header["shape"] = (10**9, 10**9)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    assert "truncated" in message(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("points.npy", buffer.getvalue())
    assert "truncated" in message(tmp_path / "a.npz")
    moon = struct.pack(">BBBBII", 0, 0, 8, 2, 2**32 - 1, 2**32 - 1)
    (tmp_path / "a.idx").write_bytes(moon)
    assert "GiB" in message(tmp_path / "a.idx")


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 0)])
def test_shapes_that_are_no_data_set(tmp_path, shape):
    np.savez(tmp_path / "a.npz", points=np.zeros(shape))
    assert f"has shape {shape}" in message(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", np.zeros(shape))
    assert message(tmp_path / "a.npy")


def test_one_point(tmp_path):
    np.save(tmp_path / "a.npy", FLOATS[:1])
    assert "only 1 point" in message(tmp_path / "a.npy")
    save_images(tmp_path / "folder", BYTES[:1])
    assert "only 1 point" in message(tmp_path / "folder")


def test_labels_that_do_not_fit(tmp_path):
    np.savez(tmp_path / "a.npz", points=FLOATS, labels=np.arange(5))
    assert "labels of shape (5,)" in message(tmp_path / "a.npz")


@pytest.mark.parametrize("max_points", [0, 1, -5, 2.5])
def test_max_points(max_points):
    with pytest.raises(ValueError, match="max_points"):
        load("digits", max_points=max_points)


def test_no_more_images_than_asked_for_are_read(tmp_path):
    save_images(tmp_path, BYTES)
    (tmp_path / "03.png").write_bytes(b"broken")
    assert len(load(tmp_path, max_points=3).points) == 3
