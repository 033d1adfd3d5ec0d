"""The mixer of `benchmarks/galaxies.py` beside one of Equinox's own layers, and its file format."""

import io
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def galaxies():
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        pytest.importorskip("matplotlib")
        import galaxies

        yield galaxies
    finally:
        sys.path.remove(folder)


class Block(eqx.Module):
    patches: eqx.nn.MLP
    hidden: eqx.nn.MLP
    norm_patches: eqx.nn.LayerNorm
    norm_hidden: eqx.nn.LayerNorm

    def __call__(self, y):
        y = y + jax.vmap(self.patches)(self.norm_patches(y))
        y = y.T
        return (y + jax.vmap(self.hidden)(self.norm_hidden(y))).T


class Network(eqx.Module):
    embed: eqx.nn.Conv2d
    unembed: eqx.nn.ConvTranspose2d
    blocks: list
    norm: eqx.nn.LayerNorm
    last_t: float

    def __call__(self, z, t):
        y = self.embed(jnp.stack([z, jnp.full_like(z, t / self.last_t)]))
        shape, y = y.shape, y.reshape(len(y), -1)
        for block in self.blocks:
            y = block(y)
        return self.unembed(self.norm(y).reshape(shape))[0]


def network(side, channels, key):
    patches, keys = (side // 4) ** 2, iter(jax.random.split(key, 40))
    blocks = [
        Block(
            eqx.nn.MLP(patches, patches, 24, depth=1, key=next(keys)),
            eqx.nn.MLP(channels, channels, 24, depth=1, key=next(keys)),
            eqx.nn.LayerNorm((channels, patches)),
            eqx.nn.LayerNorm((patches, channels)),
        )
        for _ in range(4)
    ]
    built = Network(
        eqx.nn.Conv2d(2, channels, 4, stride=4, key=next(keys)),
        eqx.nn.ConvTranspose2d(channels, 1, 4, stride=4, key=next(keys)),
        blocks,
        eqx.nn.LayerNorm((channels, patches)),
        10.0,
    )

    def jitter(leaf):
        # Norms start as the identity, which would hide an exchange of theirs.
        return leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)

    norms = [built.norm] + [n for b in blocks for n in (b.norm_patches, b.norm_hidden)]
    leaves = [leaf for norm in norms for leaf in (norm.weight, norm.bias)]
    found = {id(leaf): jitter(leaf) for leaf in leaves}
    return jax.tree.map(lambda leaf: found.get(id(leaf), leaf), built)


def test_the_same_as_equinox_from_the_same_file(galaxies):
    built = network(12, 8, jax.random.key(0))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, built)
    file.seek(0)
    weights = galaxies.read_mixer(file)
    for seed, t in enumerate((0.01, 1.0, 9.0)):
        z = 3 * jax.random.normal(jax.random.key(seed), (12, 12))
        np.testing.assert_allclose(galaxies.mixer(weights, z, t), built(z, t), rtol=1e-4, atol=1e-5)


def test_as_a_denoiser(galaxies, tmp_path):
    """D = (x_t + s^2 score) / alpha at x_t = alpha x, alpha^2 = exp(-t), sigma^2 = exp(t) - 1."""
    galaxies.write_random_mixer(tmp_path / "a.eqx", side=8, seed=0)
    with (tmp_path / "a.eqx").open("rb") as file:
        weights = galaxies.read_mixer(file)
    model, t = galaxies.denoiser_of(weights), 0.7
    x = jax.random.normal(jax.random.key(0), (8, 8))
    alpha, s2 = np.exp(-t / 2), 1 - np.exp(-t)
    expected = (alpha * x + s2 * galaxies.mixer(weights, alpha * x, t)) / alpha
    np.testing.assert_allclose(model(x, np.sqrt(np.expm1(t))), expected, rtol=1e-4, atol=1e-5)
    assert model.shape == (8, 8)


def test_files_that_are_refused(galaxies, tmp_path):
    path = tmp_path / "a.eqx"
    galaxies.write_random_mixer(path, side=8, seed=0)
    whole = path.read_bytes()

    def read(content):
        return galaxies.read_mixer(io.BytesIO(content))

    with pytest.raises(ValueError, match="such a network has 55"):
        read(whole + whole)
    with pytest.raises(ValueError):  # noqa: PT011 -- NumPy's own words
        read(whole[:-100])
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read(objects.getvalue() + whole)
    records = [np.zeros(shape) for shape in galaxies.expected_shapes(64, 4, 512)]
    records[7] = np.zeros(5)
    buffer = io.BytesIO()
    for record in records:
        np.save(buffer, record)
    with pytest.raises(ValueError, match="the arrays have shapes"):
        read(buffer.getvalue())


def test_another_wheel_is_refused(galaxies, tmp_path):
    (tmp_path / "a.whl").write_bytes(b"PK")
    with pytest.raises(SystemExit, match="SHA-256"):
        galaxies.networks_in(tmp_path / "a.whl")
    with pytest.raises(SystemExit, match="no such file"):
        galaxies.networks_in(tmp_path / "b.whl")
