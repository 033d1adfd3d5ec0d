r"""Stable Diffusion 1, 2 and XL as denoisers of latents.

    prompt  --tokenizer, text encoder-->  c          embed
    image   --AutoencoderKL-->  latent               encode, decode
    D(x; sigma, c),  D_null + scale (D_c - D_null)   denoiser

A point x is a scaled latent (h, w, channels).  Without a prompt the condition is that of the empty
one, as in the training; for Stable Diffusion XL the published pipeline takes zeros instead.  LID of
a latent is that of the latent model: the decoder is smooth, and adds no dimension where it is
injective.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax import nn, sample
from mmh_jax.denoise import Guided, NetworkDenoiser
from mmh_jax.pretrained.autoencoder import AutoencoderKL
from mmh_jax.pretrained.conditional_unet import Condition
from mmh_jax.pretrained.run import carried
from mmh_jax.pretrained.schedules import Process
from mmh_jax.pretrained.tokenizer import Tokenizer
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = ["StableDiffusion", "Text"]


class Text(NamedTuple):
    """A tokenizer and its encoder, split into a function and its parameters."""

    tokenizer: Tokenizer
    apply: nn.Apply
    params: Any

    def __call__(self, prompt: str) -> Any:
        """The `TextEncoding` of a prompt."""
        return _encoded(self.apply, self.params, self.tokenizer(prompt))


@dataclasses.dataclass(frozen=True)
class _OrNull:
    """A network that always takes a condition: without one it is given the null condition."""

    apply: nn.Apply

    def __call__(self, params: Any, x: Array, t: Array, cond: Any = None) -> Array:
        network, null = params
        return self.apply(network, x, t, null if cond is None else cond)


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """A text-to-image pipeline; made by `load`.

    Attributes:
        texts: one tokenizer and encoder, or two.
        vae: the autoencoder, split.
        unet: the network, split.
        process: that of the training.
        shape: (h, w, channels) of a latent.
        is_xl: whether the text is that of SDXL: the layer before the last of each encoder, and a
            pooled text with sizes.
        empty_is_zero: of SDXL: no prompt is a condition of zeros, not the empty prompt.
    """

    texts: tuple[Text, ...]
    vae: tuple[nn.Apply, Any]
    unet: tuple[nn.Apply, Any]
    process: Process
    shape: tuple[int, ...]
    is_xl: bool = False
    empty_is_zero: bool = True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of the images of latents of `shape`."""
        module = nnx.merge(self.vae[0].graph, self.vae[1])
        return jax.eval_shape(module.decode, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape  # pyright: ignore

    def resized(self, height: int, width: int) -> StableDiffusion:
        """The same for images of another size.

        Raises:
            ValueError: if the size is no multiple of what a latent's pixel stands for.
        """
        factor = self.image_shape[0] // self.shape[0]
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(
                f"`resized(height={height}, width={width})` must be multiples of {factor}."
            )
        shape = (height // factor, width // factor, self.shape[2])
        return dataclasses.replace(self, shape=shape)

    def embed(self, prompt: str | None) -> Any:
        """The condition of a prompt: (77, E), or a `Condition` for SDXL.

        Args:
            prompt: a text; None for the null condition.
        """
        if not self.is_xl:
            return self.texts[0](prompt or "").last
        found = [text(prompt or "") for text in self.texts]
        context = jnp.concatenate([each.hidden[-2] for each in found], axis=-1)
        pooled = found[-1].projected
        if prompt is None and self.empty_is_zero:
            context, pooled = 0 * context, 0 * pooled
        height, width, _ = self.image_shape
        sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
        return Condition(context, pooled, sizes)

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
        apply, params = self.unet
        null = self.embed(negative_prompt)
        base = self.process.denoiser(_OrNull(apply), (params, null), shape=self.shape)
        found: NetworkDenoiser = base if prompt is None else base.condition(self.embed(prompt))
        if guidance_scale is None:
            return found
        # An array: another scale is not another program.
        return Guided(found, base, jnp.asarray(guidance_scale, jnp.float32))

    def encode(self, image: ArrayLike, *, key: Key | None = None) -> Array:
        """The scaled latent of an image (H, W, channels) in [0, 1].

        Args:
            image: of any size that the autoencoder divides.
            key: draws from the posterior; None for its mean.
        """
        image = jnp.asarray(image)
        if image.ndim != 3:
            raise ValueError(
                f"`encode(image=...)` has shape {image.shape}; it is one image (H, W, channels)."
            )
        return _latent(*self.vae, 2 * image - 1, key)

    def decode(self, latent: ArrayLike) -> Array:
        """The image (H, W, channels) of a scaled latent, in [0, 1]; what is beyond is cut off."""
        return jnp.clip((_image(*self.vae, jnp.asarray(latent)) + 1) / 2, 0, 1)

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
            step: from one time to the next.
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


@jax.jit(static_argnums=0)
def _latent(apply: nn.Apply, params: Any, image: Array, key: Key | None) -> Array:
    vae: AutoencoderKL = nnx.merge(apply.graph, params)
    mean, log_variance = vae.encode(image)
    if key is not None:
        mean = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
    return vae.scale(mean)


@jax.jit(static_argnums=0)
def _image(apply: nn.Apply, params: Any, latent: Array) -> Array:
    vae: AutoencoderKL = nnx.merge(apply.graph, params)
    return vae.decode(vae.unscale(latent))
