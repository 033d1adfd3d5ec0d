r"""A variational autoencoder with a Gaussian decoder, and its training.

    z ~ N(0, I),   x | z ~ N(g(z), sigma^2 I),   q(z | x) = N(m(x), diag exp v(x))

The evidence lower bound of a point, in nats,

    ELBO = E_q log N(x; g(z), sigma^2 I) - beta KL(q | N(0, I))  <=  log p(x)   for beta = 1,

is short of log p(x) by KL(q | p(z | x)).  The expectation is taken at z = m + exp(v / 2) eps, which
lets its gradient reach the encoder (reparametrisation); the divergence is closed,

    KL = 1/2 sum_i [ m_i^2 + exp v_i - 1 - v_i ].

The noise level sigma is learned with the rest: at the optimum it is the root mean squared error of
the reconstruction (Rybkin et al. 2021), so that no weight between the two terms is left to choose.
It is the noise level at which the decoder's Jacobian is to be read: a latent direction that moves x
by less than sigma per standard deviation is one that the encoder does not bother to use
(`lid.rank_at_noise`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from mmh_jax import nn
from mmh_jax.train.rounds import check_images, ema_update, rounds
from mmh_jax.typing import Array, ArrayLike, Key

__all__ = [
    "Elbo",
    "Vae",
    "VaeConfig",
    "VaeMetrics",
    "VaeState",
    "elbo",
    "fit_vae",
    "init_vae",
    "vae",
]


@struct.dataclass
class Vae:
    """An encoder, a decoder and a noise level; a pytree, one example a call.

    Attributes:
        encoder, decoder: parameters.
        log_sigma: scalar, the log of the noise level of x given z, in data units.
        encode: `encode(params, x) -> (mean, log_variance)`; static.
        decode: `decode(params, z) -> x`; static.
    """

    encoder: Any
    decoder: Any
    log_sigma: Array
    encode: Any = struct.field(pytree_node=False)
    decode: Any = struct.field(pytree_node=False)

    @property
    def sigma(self) -> Array:
        """The noise level of x given z, in data units."""
        return jnp.exp(self.log_sigma)

    def __call__(self, z: Array) -> Array:
        """The mean of x given one latent: the decoder, as `lid.decoder_spectrum` takes it."""
        return self.decode(self.decoder, z)

    def posterior(self, x: Array) -> tuple[Array, Array]:
        """Mean and log variance of q(z | x), for one point."""
        return self.encode(self.encoder, x)


def vae(encoder: nnx.Module, decoder: nnx.Module, *, sigma: float = 0.3) -> Vae:
    """A VAE of two modules, each of one example a call.

    Args:
        encoder: `encoder(x) -> (mean, log_variance)`, as `nn.ConvEncoder`.
        decoder: `decoder(z) -> x`, as `nn.ConvDecoder`.
        sigma: where the noise level starts, in data units.

    Raises:
        ValueError: if `sigma` is not positive.

    >>> rngs = nnx.Rngs(0)
    >>> model = vae(nn.ConvEncoder(3, rngs=rngs), nn.ConvDecoder(3, rngs=rngs))
    >>> model(jnp.zeros(3)).shape, round(float(model.sigma), 2)
    ((28, 28, 1), 0.3)
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(f"`vae(sigma={sigma})` must be a positive number, in data units.")
    encode, encoder_params = nn.split(encoder)
    decode, decoder_params = nn.split(decoder)
    return Vae(encoder_params, decoder_params, jnp.log(jnp.asarray(sigma)), encode, decode)


class Elbo(NamedTuple):
    """The bound of one point and its parts, in nats.

    Attributes:
        value: `log_likelihood - beta * divergence`.
        log_likelihood: of x given a z drawn from q.
        divergence: KL(q(z | x) | N(0, I)).
    """

    value: Array
    log_likelihood: Array
    divergence: Array


def elbo(model: Vae, x: ArrayLike, *, key: Key, beta: float = 1.0) -> Elbo:
    """The evidence lower bound of one point, with one draw of z: without bias.

    Cost: one evaluation of encoder and decoder.

    Args:
        model: the VAE.
        x: one point, in data units, of the shape of the decoder's answer.
        key: draws z.
        beta: the weight of the divergence (beta-VAE, Higgins et al. 2017); the bound holds for 1.

    Raises:
        ValueError: if the decoder answers in another shape than x.

    References: Kingma & Welling 2014 (1312.6114), eqs. 3 and 10; Rybkin et al. 2021 (2006.13202).
    """
    x = jnp.asarray(x)
    mean, log_variance = model.posterior(x)
    z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
    answer = model(z)
    if answer.shape != x.shape:
        raise ValueError(
            f"`elbo(x=...)` has shape {x.shape}; this decoder answers in {answer.shape}. Reshape "
            "the points, or `jax.vmap` over many."
        )
    error2 = jnp.sum(((x - answer) / model.sigma) ** 2)
    log_likelihood = -error2 / 2 - x.size * (model.log_sigma + jnp.log(2 * jnp.pi) / 2)
    divergence = jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
    return Elbo(log_likelihood - beta * divergence, log_likelihood, divergence)


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Settings of a training run.

    Attributes:
        num_steps: optimiser steps.
        batch_size: points per step, drawn with replacement.
        learning_rate: of Adam, lowered to 0 along a cosine.
        beta: the weight of the divergence.
        ema_half_life: of the running average of the weights, in steps.
        steps_per_round: steps between two yields.
    """

    num_steps: int = 5_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    beta: float = 1.0
    ema_half_life: float = 200.0
    steps_per_round: int = 100

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "steps_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"`VaeConfig({name}={getattr(self, name)})` must be at least 1.")

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with clipping and cosine decay."""
        rate = optax.cosine_decay_schedule(self.learning_rate, self.num_steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


@struct.dataclass
class VaeState:
    """All that a run needs to continue: the model, its average (the one to keep), the optimiser."""

    model: Vae
    ema: Vae
    opt_state: Any
    step: Array


class VaeMetrics(NamedTuple):
    """What `fit_vae` yields: means over a round, in nats a point."""

    step: int
    elbo: float
    log_likelihood: float
    divergence: float
    state: VaeState


def init_vae(model: Vae, config: VaeConfig) -> VaeState:
    """The state before the first step."""
    opt_state = config.optimizer().init(model)  # pyright: ignore[reportArgumentType]
    # A copy: the state's buffers are donated to the next round.
    return jax.tree.map(jnp.array, VaeState(model, model, opt_state, jnp.zeros((), jnp.int32)))


@dataclasses.dataclass(frozen=True)
class _Step:
    config: VaeConfig

    def __call__(self, state: VaeState, batch: Array, key: Key) -> tuple[VaeState, Elbo]:
        keys = jax.random.split(key, len(batch))

        def loss(model: Vae) -> tuple[Array, Elbo]:
            each = jax.vmap(lambda x, k: elbo(model, x, key=k, beta=self.config.beta))(batch, keys)
            mean = jax.tree.map(jnp.mean, each)
            # Per coordinate, so that one clip and one rate serve images of every size.
            return -mean.value / batch[0].size, mean

        grads, metrics = jax.grad(loss, has_aux=True)(state.model)
        updates, opt_state = self.config.optimizer().update(grads, state.opt_state)
        model = optax.apply_updates(state.model, updates)  # pyright: ignore[reportArgumentType]
        ema = ema_update(state.ema, model, state.step, self.config.ema_half_life)
        return VaeState(model, ema, opt_state, state.step + 1), metrics  # pyright: ignore[reportArgumentType]


def fit_vae(
    model: Vae, points: ArrayLike, config: VaeConfig, *, key: Key, state: VaeState | None = None
) -> Iterator[VaeMetrics]:
    """Train a VAE on points, yielding after every round.

    Args:
        model: the untrained VAE (`vae`).
        points: (N, *shape), in data units, of the shape of the decoder's answer.
        config: the settings.
        key: draws batches and latents.
        state: where to continue; None starts from `model`.  A run that continues ends with the same
            weights, bit for bit, as one that was never interrupted.

    Yields:
        `VaeMetrics`.  The state given to one round is consumed by the next: save or copy it before
        asking for another.  `state.ema` is the model.

    Raises:
        TypeError: if `key` is not a typed key, or the points are not of a floating dtype.
        ValueError: if the points are not finite, or not of the decoder's shape.
        FloatingPointError: if the loss stops being finite.
    """
    points, key = check_images("fit_vae", points, key)
    state = init_vae(model, config) if state is None else state
    run = rounds(
        _Step(config),
        state,
        points,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        steps_per_round=config.steps_per_round,
        key=key,
    )
    for latest, means in run:
        yield VaeMetrics(int(latest.step), *means, latest)  # pyright: ignore[reportCallIssue]
