"""Loss curves and their gap: against models whose expected loss is known in closed form."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mmh_jax import analytic, evaluation

SIGMAS = np.array([0.05, 0.3, 1.0, 4.0])
SCALES = np.array([2.0, 0.5, 0.1])


@struct.dataclass
class Counted:
    """A denoiser that counts how often it is traced."""

    gain: float
    traces: Any = struct.field(pytree_node=False)

    def __call__(self, x, sigma):
        self.traces.append(1)
        return self.gain * x


class Traces(list):
    """The same one for all, as a static field must be."""

    __hash__ = object.__hash__


def test_another_model_of_the_same_structure_compiles_nothing():
    points, traces = np.eye(5, 2, dtype=np.float32), Traces()
    first, second = (
        evaluation.loss_curve(Counted(gain, traces), points, SIGMAS, key=jax.random.key(0))
        for gain in (0.2, 0.8)
    )
    before = len(traces)
    evaluation.loss_curve(Counted(0.5, traces), points, SIGMAS, key=jax.random.key(0))
    assert len(traces) == before
    assert not np.allclose(first.value, second.value)


def gaussian():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))[0]
    return analytic.LinearGaussian(jnp.zeros(6), jnp.asarray(basis), jnp.asarray(SCALES))


def test_the_exact_denoiser_has_its_minimal_loss(x64):
    model = gaussian()
    points = model.sample(2000, key=jax.random.key(0))
    curve = evaluation.loss_curve(model, points, SIGMAS, key=jax.random.key(1), num_noises=4)
    expected = np.sum(SCALES**2 / (SCALES**2 + SIGMAS[:, None] ** 2), axis=1)
    assert curve.losses.shape == (2000, 4)
    np.testing.assert_array_equal(curve.sigmas, SIGMAS)
    assert np.all(np.abs(curve.value - expected) < 3.5 * curve.stderr)
    assert np.all(curve.stderr < 0.05 * expected)


def test_a_point_has_the_loss_of_its_closed_form(x64):
    # E|D(x + sigma eps) - x|^2 / sigma^2 = sum [l / (l + s^2)]^2 + s^2 [y / (l + s^2)]^2.
    model = gaussian()
    x = model.sample(1, key=jax.random.key(2))
    curve = evaluation.loss_curve(
        model, jnp.repeat(x, 4000, 0), SIGMAS, key=jax.random.key(3), num_noises=1
    )
    y, total = np.asarray(x[0] @ model.basis), SCALES**2 + SIGMAS[:, None] ** 2
    expected = np.sum((SCALES**2 / total) ** 2 + SIGMAS[:, None] ** 2 * (y / total) ** 2, axis=1)
    assert np.all(np.abs(curve.value - expected) < 3.5 * curve.stderr)


def test_a_model_that_has_learned_the_law_has_no_gap(x64):
    model = gaussian()
    curve = functools.partial(evaluation.loss_curve, model, sigmas=SIGMAS, key=jax.random.key(4))
    trained, held_out = (curve(model.sample(n, key=jax.random.key(n))) for n in (300, 500))
    gap = evaluation.loss_gap(trained, held_out)
    assert np.all(np.abs(gap.value) < 3.5 * gap.stderr)
    np.testing.assert_allclose(gap.stderr**2, trained.stderr**2 + held_out.stderr**2)


def test_a_data_set_has_the_gap_of_its_distances(x64):
    points = jax.random.normal(jax.random.key(5), (40, 8))
    trained, held_out = points[:30], points[30:]
    model, sigma = analytic.Empirical(trained), 0.02
    curves = [
        evaluation.loss_curve(model, part, [sigma], key=jax.random.key(6))
        for part in (trained, held_out)
    ]
    gap = evaluation.loss_gap(*curves)
    # At this scale each noisy point is nearest to one training point, always the same.
    squares = jnp.sum((held_out[:, None] - trained) ** 2, axis=-1).min(axis=1)
    np.testing.assert_allclose(curves[0].value, 0, atol=1e-12)
    np.testing.assert_allclose(gap.value, jnp.mean(squares) / sigma**2, rtol=0.05)
    assert gap.value[0] > 4 * gap.stderr[0]


def test_noise_belongs_to_the_position(x64):
    model = gaussian()
    points = model.sample(50, key=jax.random.key(7))
    curve = functools.partial(evaluation.loss_curve, model, sigmas=SIGMAS, key=jax.random.key(8))
    whole, part = curve(points), curve(points[:20], chunk_size=7)
    np.testing.assert_allclose(part.losses, whole.losses[:20], rtol=1e-12)
    other = evaluation.loss_curve(model, points, SIGMAS, key=jax.random.key(9))
    assert np.all(other.losses != whole.losses)


def test_pairs_have_less_spread_and_the_right_mean(x64):
    model = gaussian()
    points = model.sample(400, key=jax.random.key(10))
    worse = lambda x, sigma: 0.99 * model(x, sigma)  # noqa: E731
    curve = functools.partial(evaluation.loss_curve, points=points, sigmas=SIGMAS)
    one, two = (curve(m, key=jax.random.key(11)) for m in (model, worse))
    difference = evaluation.paired_difference(one, two)
    assert np.all(difference.stderr < 0.5 * evaluation.loss_gap(one, two).stderr)
    # .99 D - x = (D - x) - .01 D, and E D (D - x) = 0: E|.01 D|^2 more.
    expected = 1e-4 * np.sum(SCALES**4 / (SCALES**2 + SIGMAS[:, None] ** 2), axis=1) / SIGMAS**2
    assert np.all(np.abs(difference.value - expected) < 3.5 * difference.stderr)


def test_bad_input_is_refused():
    model, key = lambda x, sigma: x, jax.random.key(0)
    points = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"shape \(2,\).*at least 2 points"):
        evaluation.loss_curve(model, points[0], [0.1], key=key)
    with pytest.raises(ValueError, match="finite positive"):
        evaluation.loss_curve(model, points, [0.0], key=key)
    with pytest.raises(ValueError, match=r"shape \(\).*vector"):
        evaluation.loss_curve(model, points, 0.1, key=key)
    with pytest.raises(ValueError, match="num_noises=0"):
        evaluation.loss_curve(model, points, [0.1], key=key, num_noises=0)
    with pytest.raises(TypeError, match="key"):
        evaluation.loss_curve(model, points, [0.1], key=None)
    one = evaluation.loss_curve(model, points, [0.1], key=key)
    other = evaluation.loss_curve(model, points[:2], [0.1], key=key)
    with pytest.raises(ValueError, match="3 and 2 points"):
        evaluation.paired_difference(one, other)
    with pytest.raises(ValueError, match="over the same"):
        evaluation.loss_gap(one, one._replace(sigmas=np.array([0.2])))
