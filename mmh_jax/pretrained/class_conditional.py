r"""DiT (Peebles & Xie 2023, 2212.09748) as a denoiser of latents, conditioned on a class.

    label   --id2label-->  class                     index
    image   --AutoencoderKL-->  latent               encode, decode
    D(x; sigma, c),  D_null + scale (D_c - D_null)   denoiser

The null class, that of a training without labels, is one of the network's own.  The published
networks predict the noise and a variance, which is not used: neither DDIM nor a denoiser needs it.
Guidance is on all channels of the noise, as in diffusers (there only for a scale above 1); the
code of the paper's authors guides the first three of the four.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import nn, sample
from mmh_jax.pretrained.latents import Latents, guided
from mmh_jax.pretrained.run import carried
from mmh_jax.pretrained.transformer import DiTTransformer2DModel
from mmh_jax.typing import ArrayLike, Key

__all__ = ["ClassConditional"]


@dataclasses.dataclass(frozen=True)
class ClassConditional(Latents):
    """A class-conditional pipeline such as facebook/DiT-XL-2-256; made by `load`.

    Attributes:
        vae: the autoencoder, split.
        process: that of the training.
        shape: (h, w, channels) of a latent.
        transformer: the network, split.
        labels: the names of each class, as published, separated by commas; may be empty.
    """

    transformer: tuple[nn.Apply, Any]
    labels: Mapping[int, str]

    @property
    def patch_size(self) -> int:
        """Pixels of a latent, along each side, that the network takes at once."""
        return self._module.options.patch_size

    @property
    def num_classes(self) -> int:
        """Of the network, without the null class, which has this number."""
        return self._module.null_class

    @property
    def _module(self) -> DiTTransformer2DModel:
        return nnx.merge(self.transformer[0].graph, self.transformer[1])

    def index(self, label: int | str) -> int:
        """The class of a name, or a class itself.

        Args:
            label: 0 to `num_classes` - 1; or one of the names of a class, or all as published.

        Raises:
            TypeError: if it is neither.
            ValueError: if there is no such class, or the name is of several.
        """
        if isinstance(label, str):
            return self._named(label)
        try:
            found = operator.index(label)
        except TypeError:
            found = None
        if found is None or isinstance(label, bool):
            raise TypeError(
                f"`label={str(label)[:80]}` is a {type(label).__name__}; it is a class, a whole "
                "number, or its name."
            )
        if not 0 <= found < self.num_classes:
            raise ValueError(
                f"`label={found}` is no class; there are 0 to {self.num_classes - 1}, and None is "
                "the null class."
            )
        return found

    def _named(self, name: str) -> int:
        named = [
            place
            for place, text in self.labels.items()
            if name == text or name in [part.strip() for part in text.split(",")]
        ]
        if len(named) == 1:
            return named[0]
        if named:
            raise ValueError(
                f"`label={name[:80]!r}` is a name of the classes {', '.join(map(str, named))}; "
                "pass one of these numbers."
            )
        some = ", ".join(repr(text) for text in list(self.labels.values())[:3])
        cure = f"such as {some}" if some else "of which the folder has none"
        raise ValueError(
            f"`label={name[:80]!r}` is no name in `labels`, {cure}; pass one, or a number from 0 "
            f"to {self.num_classes - 1}."
        )

    def denoiser(self, label: int | str | None = None, guidance_scale: float | None = None) -> Any:
        """A denoiser of scaled latents.

        Args:
            label: a class or its name, see `index`; None for the null class.
            guidance_scale: of classifier-free guidance, on all channels; None for the conditional
                model itself.

        Returns:
            A `NetworkDenoiser`, to which another class can be bound, `.condition(3)`; with
            guidance a `denoise.Guided` of two.
        """
        base = self.process.denoiser(*self.transformer, shape=self.shape)
        # An array: another class is not another program.
        bound = None if label is None else jnp.asarray(self.index(label), jnp.int32)
        return guided(base.condition(bound), base, guidance_scale)

    def sample(
        self,
        label: int | str | None,
        num: int = 1,
        *,
        key: Key | None = None,
        noise: ArrayLike | None = None,
        num_steps: int = 50,
        guidance_scale: float | None = 4.0,
        step: sample.Step = sample.ddim(),  # noqa: B008 (a frozen value)
        denoiser: Any = None,
        chunk_size: int = 1,
    ) -> np.ndarray:
        """Scaled latents (num, *shape), at the times of the published scheduler; see `decode`.

        Args:
            label, guidance_scale: as for `denoiser`.
            num: how many, if there is no noise.
            key: draws the noise, and that of a stochastic step.
            noise: (num, *shape) of unit variance, in place of a draw.
            num_steps: steps of the sampler.
            step: from one time to the next.
            denoiser: to sample with, in place of that of the class: one that is steered, say.
            chunk_size: latents at once.

        Raises:
            TypeError, ValueError: without key or noise, or for a wrong label, shape or number.
        """
        if denoiser is None:
            denoiser = self.denoiser(label, guidance_scale)
        return carried(
            "sample", denoiser, self.process, self.shape, num, key=key, noise=noise,
            num_steps=num_steps, step=step, chunk_size=chunk_size,
        )  # fmt: skip
