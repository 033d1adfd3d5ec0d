"""Data: sets of known dimension and data sets from files.

Flat mixtures and the von Mises toy are in `manifolds`, shapes of the plane and of space in
`curved`, manifolds of any dimension in `embedded`, flat pieces under `diffeomorphisms` in `warped`,
the manifolds on which estimators are compared (M1 to M13, Mbeta, Mn, Mp) in `benchmark`.
`registry` names them all.

`load` reads digits, faces, MNIST, FashionMNIST, CIFAR and what else is in files (`sources`).
`planting` puts known duplicates and templates into a set, `splits` finds its different rows and
splits it in two, `augment` has random changes of pictures.
"""

from mmh_jax.data import (
    augment,
    benchmark,
    curved,
    diffeomorphisms,
    embedded,
    manifolds,
    planting,
    registry,
    sources,
    splits,
    warped,
)
from mmh_jax.data.sources import Source, load

__all__ = [
    "Source",
    "augment",
    "benchmark",
    "curved",
    "diffeomorphisms",
    "embedded",
    "load",
    "manifolds",
    "planting",
    "registry",
    "sources",
    "splits",
    "warped",
]
