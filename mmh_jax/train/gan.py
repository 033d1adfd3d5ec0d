r"""A generative adversarial network, and its training: non-saturating, with the R1 penalty.

A generator x = g(z), z ~ N(0, I), and a discriminator with a logit f(x) play

    discriminator: min  E softplus(f(g(z))) + E softplus(-f(x)) + gamma/2 E |grad f(x)|^2
    generator:     min  E softplus(-f(g(z)))

with the expectations over latents z and data x.  At the optimum over f, without the penalty,
f = log p_data - log p_g.  The penalty is taken on data alone; with it the game converges where the
data lie on a manifold of lower dimension, and without it it need not (Mescheder et al. 2018).  The
running average of the generator's weights is the one to keep (Yazici et al. 2019, 1806.04498).
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
    "Gan",
    "GanConfig",
    "GanMetrics",
    "GanState",
    "discriminator_loss",
    "fit_gan",
    "gan",
    "generator_loss",
    "init_gan",
]


@struct.dataclass
class Gan:
    """A generator and a discriminator; a pytree, one example a call.

    Attributes:
        generator, discriminator: parameters.
        generate: `generate(params, z) -> x`; static.
        discriminate: `discriminate(params, x) -> logit`; static.
        latent_size: of z; static.
    """

    generator: Any
    discriminator: Any
    generate: Any = struct.field(pytree_node=False)
    discriminate: Any = struct.field(pytree_node=False)
    latent_size: int = struct.field(pytree_node=False)

    def __call__(self, z: Array) -> Array:
        """One sample, of one latent: the generator, as `lid.decoder_spectrum` takes it."""
        return self.generate(self.generator, z)

    def logit(self, x: Array) -> Array:
        """How real one point looks."""
        return self.discriminate(self.discriminator, x)


def gan(generator: nnx.Module, discriminator: nnx.Module, *, latent_size: int) -> Gan:
    """A GAN of two modules, each of one example a call.

    Args:
        generator: `generator(z) -> x`, as `nn.ConvDecoder`.
        discriminator: `discriminator(x)`, a scalar, as `nn.ConvDiscriminator`.
        latent_size: of z.

    >>> rngs = nnx.Rngs(0)
    >>> model = gan(nn.ConvDecoder(3, rngs=rngs), nn.ConvDiscriminator(rngs=rngs), latent_size=3)
    >>> model(jnp.zeros(3)).shape, model.logit(jnp.zeros((28, 28, 1))).shape
    ((28, 28, 1), ())
    """
    generate, generator_params = nn.split(generator)
    discriminate, discriminator_params = nn.split(discriminator)
    return Gan(generator_params, discriminator_params, generate, discriminate, latent_size)


def generator_loss(model: Gan, z: Array) -> Array:
    """softplus(-f(g(z))) of one latent: the non-saturating loss (Goodfellow et al. 2014)."""
    return jax.nn.softplus(-model.logit(model(z)))


def discriminator_loss(
    model: Gan, x: Array, z: Array, *, penalty: float
) -> tuple[Array, tuple[Array, Array]]:
    """The discriminator's loss at one point and one latent.

    Args:
        model: the GAN.
        x: a point of the data.
        z: a latent.
        penalty: gamma, in squared data units.

    Returns:
        The loss, and beside it the logit at x less that at g(z), and |grad f(x)|^2.

    Cost: two evaluations of the discriminator, one with its gradient, and one of the generator.

    References: Mescheder, Geiger & Nowozin 2018 (1801.04406), eq. 9.
    """
    fake = model.logit(jax.lax.stop_gradient(model(z)))
    real, gradient = jax.value_and_grad(model.logit)(x)
    steepness = jnp.sum(gradient**2)
    loss = jax.nn.softplus(fake) + jax.nn.softplus(-real) + penalty / 2 * steepness
    return loss, (real - fake, steepness)


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """Settings of a training run.

    Attributes:
        num_steps: steps of each of the two.
        batch_size: points, and latents, per step.
        learning_rate: of Adam without momentum, for both.
        penalty: gamma, in squared data units.
        ema_half_life: of the generator's running average, in steps.
        steps_per_round: steps between two yields.
    """

    num_steps: int = 5_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    penalty: float = 1.0
    ema_half_life: float = 200.0
    steps_per_round: int = 100

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "steps_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"`GanConfig({name}={getattr(self, name)})` must be at least 1.")
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"`GanConfig(penalty={self.penalty})` must be 0 or positive.")

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with b1 = 0, as with the penalty momentum only delays."""
        return optax.adam(self.learning_rate, b1=0.0, b2=0.99)


@struct.dataclass
class GanState:
    """All that a run needs to continue.

    Attributes:
        model: both players.
        ema: the model with the average of the generator's weights.
        generator_opt, discriminator_opt: of the optimisers.
        step: how many are done.
    """

    model: Gan
    ema: Gan
    generator_opt: Any
    discriminator_opt: Any
    step: Array


class GanMetrics(NamedTuple):
    """What `fit_gan` yields: means over a round.

    Attributes:
        step: how many are done.
        generator_loss, discriminator_loss: the latter with its penalty.
        margin: the logit at data less that at samples; 0 where they cannot be told apart.
        steepness: |grad f|^2 at the data.
        state: to continue from.
    """

    step: int
    generator_loss: float
    discriminator_loss: float
    margin: float
    steepness: float
    state: GanState


def init_gan(model: Gan, config: GanConfig) -> GanState:
    """The state before the first step."""
    optimizer, zero = config.optimizer(), jnp.zeros((), jnp.int32)
    states = optimizer.init(model.generator), optimizer.init(model.discriminator)
    # A copy: the state's buffers are donated to the next round.
    return jax.tree.map(jnp.array, GanState(model, model, *states, zero))


@dataclasses.dataclass(frozen=True)
class _Step:
    config: GanConfig

    def __call__(self, state: GanState, batch: Array, key: Key) -> tuple[GanState, Any]:
        config, optimizer = self.config, self.config.optimizer()
        latents = jax.random.normal(key, (2, len(batch), state.model.latent_size), batch.dtype)

        def of_discriminator(params: Any) -> tuple[Array, Any]:
            model = dataclasses.replace(state.model, discriminator=params)
            each = jax.vmap(lambda x, z: discriminator_loss(model, x, z, penalty=config.penalty))
            loss, beside = jax.tree.map(jnp.mean, each(batch, latents[0]))
            return loss, beside

        (loss, beside), grads = jax.value_and_grad(of_discriminator, has_aux=True)(
            state.model.discriminator
        )
        updates, discriminator_opt = optimizer.update(grads, state.discriminator_opt)
        discriminator = optax.apply_updates(state.model.discriminator, updates)

        def of_generator(params: Any) -> Array:
            model = dataclasses.replace(state.model, generator=params, discriminator=discriminator)
            return jnp.mean(jax.vmap(lambda z: generator_loss(model, z))(latents[1]))

        own_loss, grads = jax.value_and_grad(of_generator)(state.model.generator)
        updates, generator_opt = optimizer.update(grads, state.generator_opt)
        generator = optax.apply_updates(state.model.generator, updates)
        model = dataclasses.replace(state.model, generator=generator, discriminator=discriminator)
        mean = ema_update(state.ema.generator, generator, state.step, config.ema_half_life)
        ema = dataclasses.replace(model, generator=mean)
        new = GanState(model, ema, generator_opt, discriminator_opt, state.step + 1)
        return new, (own_loss, loss, *beside)


def fit_gan(
    model: Gan, points: ArrayLike, config: GanConfig, *, key: Key, state: GanState | None = None
) -> Iterator[GanMetrics]:
    """Train a GAN on points, yielding after every round.

    Args:
        model: the untrained GAN (`gan`).
        points: (N, *shape), in data units, of the shape of the generator's answer.
        config: the settings.
        key: draws batches and latents.
        state: where to continue; None starts from `model`.  A run that continues ends with the same
            weights, bit for bit, as one that was never interrupted.

    Yields:
        `GanMetrics`.  The state given to one round is consumed by the next: save or copy it before
        asking for another.  `state.ema` is the model.

    Raises:
        TypeError: if `key` is not a typed key, or the points are not of a floating dtype.
        ValueError: if the points are not finite, or not of the generator's shape.
        FloatingPointError: if a loss stops being finite.
    """
    points, key = check_images("fit_gan", points, key)
    like = jax.ShapeDtypeStruct((model.latent_size,), points.dtype)
    answer = jax.eval_shape(model, like)
    if answer.shape != points.shape[1:]:
        raise ValueError(
            f"`fit_gan(points=...)` holds points of shape {points.shape[1:]}; this generator "
            f"answers in {answer.shape}. Reshape them."
        )
    state = init_gan(model, config) if state is None else state
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
        yield GanMetrics(int(latest.step), *means, latest)  # pyright: ignore[reportCallIssue]
