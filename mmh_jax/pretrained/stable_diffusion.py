r"""Stable Diffusion 1, 2, XL and 3 as denoisers of latents: how each conditions on a prompt.

| model | context                                              | beside it                       |
|-------|------------------------------------------------------|---------------------------------|
| 1, 2  | the last layer of one encoder                        |                                 |
| XL    | the layer before the last, of two encoders together  | the second's pooled text, sizes |
| 3     | the same, padded, then the tokens of a third, T5     | both pooled texts               |

Without a prompt the condition is that of the empty one, as in the training; for Stable Diffusion XL
the published pipeline takes zeros instead.  T5 is not read here: its tokens are zeros, as in
diffusers without it, and as for a part of the texts of the training (Esser et al. 2024, 2403.03206,
"Flexible text encoders": without T5 the model spells worse, and loses little else).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mmh_jax import nn
from mmh_jax.pretrained.conditional_unet import Condition
from mmh_jax.pretrained.sd3 import JointCondition, SD3Transformer2DModel
from mmh_jax.pretrained.text_to_image import TextToImage
from mmh_jax.typing import Array, ArrayLike

__all__ = ["StableDiffusion", "StableDiffusion3"]

_T5_LENGTH = 256  # of diffusers' pipeline, `max_sequence_length`


@dataclasses.dataclass(frozen=True)
class StableDiffusion(TextToImage):
    """Stable Diffusion 1, 2 or XL; made by `load`.

    Attributes:
        vae: the autoencoder, split.
        process: that of the training.
        shape: (h, w, channels) of a latent.
        texts: one tokenizer and encoder, or two.
        unet: the network, split.
        is_xl: whether the text is that of SDXL: the layer before the last of each encoder, and a
            pooled text with sizes.
        empty_is_zero: of SDXL: no prompt is a condition of zeros, not the empty prompt.
    """

    unet: tuple[nn.Apply, Any]
    is_xl: bool = False
    empty_is_zero: bool = True

    @property
    def network(self) -> tuple[nn.Apply, Any]:
        """The network, split: `unet`."""
        return self.unet

    def embed(self, prompt: str | None) -> Any:
        """The condition of a prompt: (77, E), or a `Condition` for SDXL.

        Args:
            prompt: a text; None for the null condition.
        """
        found = self.embed_ids([text.tokenizer(prompt or "") for text in self.texts])
        if self.is_xl and prompt is None and self.empty_is_zero:
            return found._replace(context=0 * found.context, text_embeds=0 * found.text_embeds)
        return found

    def embed_ids(self, ids: Sequence[ArrayLike]) -> Any:
        """The condition of a prompt given as ids, (77,) for each encoder."""
        found = [text.of_ids(row) for text, row in zip(self.texts, ids, strict=True)]
        if not self.is_xl:
            return found[0].last
        height, width, _ = self.image_shape
        sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
        return Condition(_before_last(found), found[-1].projected, sizes)


@dataclasses.dataclass(frozen=True)
class StableDiffusion3(TextToImage):
    """Stable Diffusion 3 or 3.5 without T5, a flow-matching model; made by `load`.

    The published pipeline samples in 28 steps at a guidance scale of 7 (3.5: 4.5).

    Attributes:
        vae: the autoencoder, split.
        process: that of the training.
        shape: (h, w, channels) of a latent.
        texts: two tokenizers and encoders with projection.
        transformer: the network, split.
    """

    transformer: tuple[nn.Apply, Any]

    @property
    def network(self) -> tuple[nn.Apply, Any]:
        """The network, split: `transformer`."""
        return self.transformer

    @property
    def patch_size(self) -> int:
        """Pixels of a latent, along each side, that the network takes at once."""
        return self._module.options.patch_size

    @property
    def _module(self) -> SD3Transformer2DModel:
        return nnx.merge(self.transformer[0].graph, self.transformer[1])

    def embed(self, prompt: str | None) -> JointCondition:
        """The condition of a prompt: a context (77 + 256, joint_attention_dim), a pooled vector.

        Args:
            prompt: a text; None for the null condition, that of the empty prompt.
        """
        return self.embed_ids([text.tokenizer(prompt or "") for text in self.texts])

    def embed_ids(self, ids: Sequence[ArrayLike]) -> JointCondition:
        """The condition of a prompt given as ids, (77,) for each encoder."""
        found = [text.of_ids(row) for text, row in zip(self.texts, ids, strict=True)]
        clip = _before_last(found)
        room = self._module.options.joint_attention_dim - clip.shape[-1]
        context = jnp.pad(clip, ((0, _T5_LENGTH), (0, room)))
        return JointCondition(context, jnp.concatenate([each.projected for each in found]))


def _before_last(encodings: list[Any]) -> Array:
    """The layer before the last of all encoders, together."""
    return jnp.concatenate([each.hidden[-2] for each in encodings], axis=-1)
