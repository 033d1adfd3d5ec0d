"""Figures, drawn with matplotlib's objects: no `pyplot`, no window, no global state.

A function returns a `Figure`; save it with `figure.savefig(path)`.  Colours are those of Okabe and
Ito (2008), told apart under every common colour blindness; each verdict also has its own marker.
"""

from mmh_jax.plotting.dimensions import curves_figure, dimension_figure
from mmh_jax.plotting.samples import frontier_figure, image_grid, plane_figure, tradeoff_figure
from mmh_jax.plotting.style import OKABE_ITO, STYLE
from mmh_jax.plotting.training import loss_figure, onset_figure

__all__ = [
    "OKABE_ITO",
    "STYLE",
    "curves_figure",
    "dimension_figure",
    "frontier_figure",
    "image_grid",
    "loss_figure",
    "onset_figure",
    "plane_figure",
    "tradeoff_figure",
]
