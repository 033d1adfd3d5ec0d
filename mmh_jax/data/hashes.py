"""SHA-256 of published files: whether a file is what its name says.

A hash is of the content after gzip, so that a file is the same packed and unpacked.  MNIST and
FashionMNIST have the same names, as have others (KMNIST): a name alone says little.  Of CIFAR10 and
CIFAR100 hashes are published for the archives only; of the files in them the number of pictures is
known, so that a file cut off between two pictures is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mmh_jax.data.files import damage_reported, open_unpacked

__all__ = ["PUBLISHED", "PUBLISHED_SIZES", "verify", "verify_content", "verify_sizes"]

PUBLISHED: dict[str, dict[str, str]] = {
    "train-images-idx3-ubyte": {
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db": "MNIST",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888": "FashionMNIST",
    },
    "train-labels-idx1-ubyte": {
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5": "MNIST",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9": "FashionMNIST",
    },
    "t10k-images-idx3-ubyte": {
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7": "MNIST",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b": "FashionMNIST",
    },
    "t10k-labels-idx1-ubyte": {
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2": "MNIST",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34": "FashionMNIST",
    },
    "mnist_5k.csv": {
        "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053": "MNIST, 5,000 of it",
    },
    "lfw_subset.npy": {
        "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c": "Labeled Faces",
    },
}
"""By the name of the file, without `.gz`: the hash of its content, and the set it belongs to."""

PUBLISHED_SIZES: dict[str, int] = {
    **{f"data_batch_{number}.bin": 10_000 * 3073 for number in range(1, 6)},
    "test_batch.bin": 10_000 * 3073,
    "train.bin": 50_000 * 3074,
    "test.bin": 10_000 * 3074,
}
"""Bytes of the files of CIFAR10 and CIFAR100, by name."""

# More than the largest of them: what is longer differs, and need not be read to its end.
_MOST_BYTES = 2**26


def verify(paths: Sequence[Path]) -> bool | None:
    """Whether files of published names are the published ones, all of the same set.

    Returns:
        None if no name is in `PUBLISHED`; False if one of those that are has other content.

    Raises:
        ValueError: if a gzipped file is damaged.
    """
    answers = []
    for path in paths:
        if _name(path.name) in PUBLISHED:
            fault, cure = "is truncated or damaged", "Download it or write it again."
            with damage_reported(path, fault, cure), open_unpacked(path) as file:
                answers.append(_published_set(path.name, file))
    return None if not answers else len(set(answers)) == 1 and answers[0] is not None


def verify_sizes(paths: Sequence[Path]) -> bool | None:
    """False if a file of CIFAR has not its published size; None if all have: it proves little."""
    right = all(path.stat().st_size == PUBLISHED_SIZES[path.name.lower()] for path in paths)
    return None if right else False


def verify_content(name: str, file: IO[bytes]) -> bool | None:
    """As `verify`, of one open file of that name, already unpacked."""
    return _published_set(name, file) is not None if _name(name) in PUBLISHED else None


def _name(name: str) -> str:
    # MNIST is also found with a dot in this place, after unpacking by some programs.
    return name.removesuffix(".gz").replace(".idx", "-idx")


def _published_set(name: str, file: IO[bytes]) -> str | None:
    digest, num_bytes = hashlib.sha256(), 0
    while block := file.read(2**20):
        digest.update(block)
        num_bytes += len(block)
        if num_bytes > _MOST_BYTES:
            return None
    return PUBLISHED[_name(name)].get(digest.hexdigest())
