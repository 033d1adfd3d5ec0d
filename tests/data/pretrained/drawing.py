"""Weights of a published layout, drawn by NumPy: the same with PyTorch and without it."""

import zlib

import numpy as np


def draw(shapes, *, seed=0):
    """A weight for each published name and shape, of a scale at which networks are not linear."""
    return {name: _one(name, tuple(shape), seed) for name, shape in shapes.items()}


def _one(name, shape, seed):
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.normal(size=shape)
    if len(shape) < 2:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return (centre + 0.2 * values).astype(np.float32)
    return (values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def images(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def load(module, *, seed=0, rename=lambda name: name):
    """A PyTorch module with drawn weights; `rename` gives the published name of its own."""
    import torch

    state = module.state_dict()
    drawn = draw({rename(name): value.shape for name, value in state.items()}, seed=seed)
    module.load_state_dict({name: torch.from_numpy(drawn[rename(name)]) for name in state})
    return module.eval()
