"""Averages by powers of time, and those of another width rebuilt from snapshots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from mmh_jax import train
from mmh_jax.train import ema
from mmh_jax.train.rounds import ema_update


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.288))
def test_the_exponent_has_the_width(width):
    gamma = ema.exponent(width)
    profile = lambda u: (gamma + 1) * u**gamma  # noqa: E731
    mean = quad(lambda u: u * profile(u), 0, 1, epsabs=1e-12)[0]
    variance = quad(lambda u: (u - mean) ** 2 * profile(u), 0, 1, epsabs=1e-12)[0]
    assert variance**0.5 == pytest.approx(width, rel=1e-5)


def test_the_plain_mean_is_the_widest():
    assert ema.exponent(ema.WIDEST_PROFILE) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
        ema.exponent(0.3)


@pytest.mark.parametrize(("a", "b"), [((6.9, 100), (17, 60)), ((2.0, 50), (2.0, 80))])
def test_inner_products_of_profiles(a, b):
    def profile(gamma, end):
        return lambda t: (gamma + 1) * t**gamma / end ** (gamma + 1) * (t <= end)

    one, other = profile(*a), profile(*b)
    exact = quad(lambda t: one(t) * other(t), 0, min(a[1], b[1]))[0]
    assert ema._products([a[0]], [a[1]], [b[0]], [b[1]])[0, 0] == pytest.approx(exact, rel=1e-8)
    assert ema._products([b[0]], [b[1]], [a[0]], [a[1]])[0, 0] == pytest.approx(exact, rel=1e-8)


def averages_of(weights, widths, keep):
    """The averages of a sequence of weights, at the steps `keep`."""
    means, found = [weights[0]] * len(widths), {}
    for number, new in enumerate(weights, 1):
        for i, width in enumerate(widths):
            rate = float(ema.average_rate(number, ema.exponent(width)))
            means[i] = means[i] + rate * (new - means[i])
        if number in keep:
            found[number] = list(means)
    return found


@pytest.mark.parametrize("half_life", [5.0, 500.0])
def test_a_half_life_forgets_the_start_and_then_halves(x64, half_life):
    rates = [float(ema.halving_rate(step, half_life)) for step in range(20_000)]
    kept = np.cumprod(1 - np.asarray(rates))
    assert kept[49] < (10 / 60) ** 9 + 1e-12  # of the start, after 50 steps
    settled = int(9 * half_life / np.log(2)) + 10
    late = settled + round(half_life)
    np.testing.assert_allclose(np.prod(1 - np.asarray(rates[settled:late])), 0.5, rtol=1e-6)


def test_the_average_of_a_decoder_is_by_the_same_rate(x64):
    mean, new = {"w": jnp.zeros(3, jnp.float32)}, {"w": jnp.ones(3, jnp.float32)}
    for step in range(5):
        mean = ema_update(mean, new, jnp.asarray(step), 100.0)
    left = np.prod([(1 + step) / (10 + step) for step in range(5)])
    np.testing.assert_allclose(1 - mean["w"], left, rtol=1e-3)
    assert mean["w"].dtype == jnp.float32


def test_another_width_is_rebuilt(x64):
    rng = np.random.default_rng(0)
    weights = np.cumsum(rng.normal(size=(2000, 50)), axis=0)  # a walk, as weights in training
    widths, keep = (0.05, 0.10), range(125, 2001, 125)
    kept = averages_of(weights, widths, keep)
    truth = averages_of(weights, (0.07, 0.15, 0.25), [2000])[2000]
    for width, expected in zip((0.07, 0.15, 0.25), truth, strict=True):
        found = ema.reconstruct(
            [{"w": mean} for number in keep for mean in kept[number]],
            [number for number in keep for _ in widths],
            list(widths) * len(keep), step=2000, width=width,
        )["w"]  # fmt: skip
        nearest = min(np.linalg.norm(mean - expected) for mean in kept[2000])
        assert np.linalg.norm(found - expected) < 0.05 * nearest, width
    # A shorter run, from snapshots of the longer one.
    found = ema.reconstruct(
        [mean for number in keep for mean in kept[number]],
        [number for number in keep for _ in widths],
        list(widths) * len(keep), step=1500, width=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(found, kept[1500][1], rtol=1e-6)


def test_what_is_averaged_in_training(x64):
    from test_train import CONFIG, circle, last, untrained

    config = CONFIG.__class__(num_steps=30, batch_size=100, steps_per_round=1, ema_widths=(0.1,))
    key, model, seen = jax.random.key(0), untrained(), []
    for metrics in train.fit(model, circle(), config, key=key):
        seen.append(np.array(metrics.state.params["leave"]["kernel"][...]))
    kept = averages_of(np.stack(seen), (0.1,), [30])[30][0]
    found = metrics.state.averages[0]["leave"]["kernel"][...]
    np.testing.assert_allclose(found, kept, rtol=1e-4, atol=1e-8)
    assert last(train.fit(model, circle(), config, key=key)).state.averages


def test_averages_come_from_checkpoints(tmp_path):
    from test_train import CONFIG, circle, untrained

    widths = (0.05, 0.1)
    config = CONFIG.__class__(num_steps=64, batch_size=100, steps_per_round=1, ema_widths=widths)
    model, points = untrained(), circle()
    like = train.init_state(model, config)
    fingerprint = train.run_fingerprint(points, config)
    with train.Checkpoints(tmp_path, fingerprint, keep=1, keep_every=8) as checkpoints:
        for metrics in train.fit(model, points, config, key=jax.random.key(0)):
            checkpoints.save(metrics.state)
        assert checkpoints.steps == [8, 16, 24, 32, 40, 48, 56, 64]
        same = checkpoints.average(like, widths, width=0.1)
        for a, b in zip(
            jax.tree.leaves(same), jax.tree.leaves(metrics.state.averages[1]), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        early = checkpoints.at(32, like)
        assert int(early.step) == 32
        with pytest.raises(KeyError, match="no state of step 33"):
            checkpoints.at(33, like)
        with pytest.raises(ValueError, match="tracked the widths"):
            checkpoints.average(like, (), width=0.1)


def test_profile_errors():
    with pytest.raises(ValueError, match="2 and 1 entries"):
        train.profile_coefficients([1, 2], [0.1], step=2, width=0.1)
    with pytest.raises(ValueError, match="the future is not known"):
        train.profile_coefficients([1, 2], [0.1, 0.1], step=3, width=0.1)
    assert ema.average_rate(1, 5.0) == 1.0
    np.testing.assert_allclose(ema.average_rate(2_000_000, 6.94), 7.94 / 2e6, rtol=1e-5)
