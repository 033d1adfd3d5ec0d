"""Data: sets of known dimension and data sets from files.

Flat mixtures and the von Mises toy are in `manifolds`, shapes of the plane and of space in
`curved`, manifolds of any dimension in `embedded`, flat pieces under `diffeomorphisms` in `warped`.
Files are read by `sources`.
"""

from mmh_jax.data import curved, diffeomorphisms, embedded, manifolds, sources, warped
from mmh_jax.data.sources import Source, load

__all__ = [
    "Source",
    "curved",
    "diffeomorphisms",
    "embedded",
    "load",
    "manifolds",
    "sources",
    "warped",
]
