r"""What text-to-image pipelines share: a prompt becomes a condition, and a condition a denoiser.

    prompt  --tokenizers, text encoders-->  c        embed, of each pipeline its own
    D(x; sigma, c),  D_null + scale (D_c - D_null)   denoiser

Without a prompt the condition is the null condition c = `embed(None)`, as in the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import nn, sample
from mmh_jax.denoise import NetworkDenoiser
from mmh_jax.pretrained.clip import CLIPTextModel
from mmh_jax.pretrained.latents import Latents, guided
from mmh_jax.pretrained.run import carried
from mmh_jax.pretrained.tokenizer import Tokenizer
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["Text", "TextToImage"]


class Text(NamedTuple):
    """A tokenizer and its encoder, split into a function and its parameters."""

    tokenizer: Tokenizer
    apply: nn.Apply
    params: Any

    def __call__(self, prompt: str) -> Any:
        """The `TextEncoding` of a prompt."""
        return self.of_ids(self.tokenizer(prompt))

    def of_ids(self, ids: Any) -> Any:
        """The `TextEncoding` of ids, (L,)."""
        return _encoded(self.apply, self.params, jnp.asarray(ids))

    @property
    def widths(self) -> tuple[int, int]:
        """Of the layers, and of the projection of the pooled text; 0 where there is none."""
        encoder: CLIPTextModel = nnx.merge(self.apply.graph, self.params)
        projection = encoder.text_projection
        return encoder.width, 0 if projection is None else projection.weight.shape[0]


@dataclasses.dataclass(frozen=True)
class _OrNull:
    """A network that always takes a condition: without one it is given the null condition."""

    apply: nn.Apply

    def __call__(self, params: Any, x: Array, t: Array, cond: Any = None) -> Array:
        network, null = params
        return self.apply(network, x, t, null if cond is None else cond)


@dataclasses.dataclass(frozen=True)
class TextToImage(Latents):
    """A text-to-image pipeline; `StableDiffusion` and `StableDiffusion3` are such.

    Attributes:
        texts: a tokenizer and encoder each.
    """

    texts: tuple[Text, ...]

    @property
    def network(self) -> tuple[nn.Apply, Any]:
        """The network, split."""
        raise NotImplementedError

    def embed(self, prompt: str | None) -> Any:
        """The condition of a prompt; of None the null condition."""
        raise NotImplementedError

    def embed_ids(self, ids: Sequence[ArrayLike]) -> Any:
        """The condition of a prompt given as ids, (L,) for each of `texts`: with tokens replaced.

        `embed(prompt)` is that of `[text.tokenizer(prompt) for text in texts]`.
        """
        raise NotImplementedError

    def denoiser(
        self,
        prompt: str | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Any:
        """A denoiser of scaled latents.

        Args:
            prompt: a text; None for the model without one.
            guidance_scale: of classifier-free guidance; None for the conditional model itself.
            negative_prompt: what guidance leads away from; by default no prompt.

        Returns:
            A `NetworkDenoiser`, to which other conditions can be bound (`embed`); with guidance a
            `denoise.Guided` of two.
        """
        apply, params = self.network
        null = self.embed(negative_prompt)
        base = self.process.denoiser(_OrNull(apply), (params, null), shape=self.shape)
        found: NetworkDenoiser = base if prompt is None else base.condition(self.embed(prompt))
        return guided(found, base, guidance_scale)

    def sample(
        self,
        prompt: str | None,
        num: int = 1,
        *,
        key: Key | None = None,
        noise: ArrayLike | None = None,
        num_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        step: sample.Step = sample.ddim(),  # noqa: B008 (a frozen value)
        denoiser: Any = None,
        chunk_size: int = 1,
    ) -> np.ndarray:
        """Scaled latents (num, *shape), at the times of the published scheduler; see `decode`.

        Args:
            prompt: a text, or None.
            num: how many, if there is no noise.
            key: draws the noise, and that of a stochastic step.
            noise: (num, *shape) of unit variance, in place of a draw.
            num_steps: steps of the sampler.
            guidance_scale, negative_prompt: as for `denoiser`.
            step: from one time to the next; `sample.ddim()` is Euler's step of flow matching, too.
            denoiser: to sample with, in place of that of the prompt: one that is steered, say.
            chunk_size: latents at once.

        Raises:
            TypeError, ValueError: without key or noise, or for a wrong shape or number.
        """
        if denoiser is None:
            denoiser = self.denoiser(prompt, guidance_scale, negative_prompt)
        return carried(
            "sample", denoiser, self.process, self.shape, num, key=key, noise=noise,
            num_steps=num_steps, step=step, chunk_size=chunk_size,
        )  # fmt: skip


@jax.jit(static_argnums=0)
def _encoded(apply: nn.Apply, params: Any, ids: Array) -> Any:
    return apply(params, ids)
