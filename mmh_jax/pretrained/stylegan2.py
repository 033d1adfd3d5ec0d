r"""The generator of StyleGAN2-ADA (Karras et al. 2020, 2006.06676), published as
NVlabs/stylegan2-ada-pytorch.

    w     = f(z / rms(z)[, embedding of a class / rms])            `mapping`, a dense network f
    w    <- w_avg + truncation (w - w_avg)
    image = g(w, noise)                                            `synthesis`, from 4 x 4 on

It maps a latent z to one image in -1 to 1, more or less: nothing cuts it there.  As it is a
function of z, `lid.decoder_spectrum(generator, z)` gives the singular values of its Jacobian, and
their number above zero is the dimension of what it generates around that image.  z is divided by
its root mean square, so that its own direction moves nothing: of z the rank is at most z_dim - 1,
from the first layer on.  Of w, `lid.decoder_spectrum(generator.synthesis, w)`, it may be w_dim.

The noise of a published model is part of it, one fixed array for each layer; with other noise for
each image there would be no function of z, so that this is not offered.

A model is a folder with `config.json`, the arguments with which it was made, and
`model.safetensors`; `docs/pretrained.md` has the recipe that exports them.  All is computed in
float32, where the published code takes float16 at high resolutions on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from mmh_jax.data.files import PathLike
from mmh_jax.pretrained.config import one_of, options
from mmh_jax.pretrained.edm_blocks import check_filters
from mmh_jax.pretrained.files import read_json
from mmh_jax.pretrained.stylegan2_networks import (
    MappingNetwork,
    StyleGAN2GeneratorOptions,
    SynthesisNetwork,
)
from mmh_jax.pretrained.tensors import open_weights
from mmh_jax.pretrained.weights import restore
from mmh_jax.typing import Array, ArrayLike

__all__ = ["StyleGAN2Generator", "load_stylegan2"]

_REQUIRED = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")


class StyleGAN2Generator(nnx.Module):
    """image = synthesis(mapping(z)), one latent to one image; for several, `jax.vmap`.

    Args:
        config: the arguments of the model.
        noise_mode: "const", the noise that is part of the model, or "none".
        rngs: the source of the initial weights.

    Raises:
        TypeError, ValueError: if an argument is missing, unknown, not of its type, or names what is
            not here, such as another architecture than "skip".

    >>> import jax, jax.numpy as jnp
    >>> config = {"z_dim": 8, "c_dim": 0, "w_dim": 8, "img_resolution": 8, "img_channels": 3}
    >>> def answer(z):
    ...     return StyleGAN2Generator(config, rngs=nnx.Rngs(0))(z)
    >>> jax.eval_shape(answer, jnp.ones(8)).shape
    (8, 8, 3)
    """

    def __init__(self, config: Mapping[str, Any], *, noise_mode: str = "const", rngs: nnx.Rngs):
        o = _options(config)
        self.mapping = MappingNetwork(o, rngs=rngs)
        self.synthesis = SynthesisNetwork(o, noise_mode=noise_mode, rngs=rngs)

    def __call__(
        self, z: ArrayLike, label: ArrayLike | None = None, *, truncation: ArrayLike = 1.0
    ) -> Array:
        """The image of one latent.

        Args:
            z, label, truncation: as for `MappingNetwork`.

        Returns:
            (img_resolution, img_resolution, img_channels), in -1 to 1 as published.
        """
        return self.synthesis(self.mapping(z, label, truncation=truncation))


def _options(config: Mapping[str, Any]) -> StyleGAN2GeneratorOptions:
    one_of("load_stylegan2", "_class_name", config.get("_class_name", "Generator"), ("Generator",))
    for name in _REQUIRED:
        if config.get(name) is None:
            raise ValueError(
                f"`StyleGAN2Generator(config=...)` has no {name}; export it as documented."
            )
    o: StyleGAN2GeneratorOptions = options(StyleGAN2GeneratorOptions, config)
    if min(o.z_dim, o.w_dim, o.img_channels) < 1:
        raise ValueError(
            f"`StyleGAN2Generator(z_dim={o.z_dim}, w_dim={o.w_dim}, "
            f"img_channels={o.img_channels})` must all be at least 1."
        )
    return o


def load_stylegan2(
    folder: PathLike,
    *,
    noise_mode: str = "const",
    place: Callable[[str, np.ndarray], Array] | None = None,
) -> StyleGAN2Generator:
    """Read an exported model.

    Args:
        folder: with `config.json` and `model.safetensors`, as `docs/pretrained.md` exports them.
        noise_mode: "const", the noise that is part of the model, or "none".  "random" is not
            offered: an image would be no function of its latent.
        place: as in `restore`.

    Returns:
        The generator g, in float32: `g(z)`, or `g(z, label)` where the model has classes, is one
        image; `g.mapping` and `g.synthesis` are its halves.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError, ValueError: if a file is wrong, asks for what is not here, or the two do not fit.
    """
    config = read_json(Path(folder) / "config.json", caller="load_stylegan2")
    tensors = open_weights(folder, caller="load_stylegan2", stem="model")
    network = restore(
        lambda: StyleGAN2Generator(config, noise_mode=noise_mode, rngs=nnx.Rngs(0)),
        tensors,
        caller="load_stylegan2",
        path=folder,
        rename=lambda name: None if name.endswith(".resample_filter") else name,
        place=place,
    )
    # Layers that do not double have a filter, too, which is of the default and not used.
    used = {k: v for k, v in tensors.items() if not k.endswith(".conv1.resample_filter")}
    check_filters("load_stylegan2", folder, used, network.synthesis.taps)
    return network
