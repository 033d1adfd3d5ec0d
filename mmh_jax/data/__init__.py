"""Data: sets of known dimension (`manifolds`) and data sets from files (`sources`)."""

from mmh_jax.data import manifolds, sources
from mmh_jax.data.sources import Source, load

__all__ = ["Source", "load", "manifolds", "sources"]
