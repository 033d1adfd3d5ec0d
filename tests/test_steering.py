"""Measures to steer by, rejection and populations on laws where what comes out is known."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st
from test_guidance import line_and_atom
from test_sample import permutation_p

from mmh_jax import analytic, lid, linalg, sample
from mmh_jax.mitigation import (
    DenoisedLid,
    JacobianTrace,
    LidGuided,
    Target,
    particles,
    sample_selected,
    systematic_resampling,
)

ATOM = np.array([0.0, 2.0])
LEVELS = sample.karras_levels(24, sigma_min=0.02, sigma_max=10.0)


# Measures


def plane(scales, seed=0):
    """A Gaussian of these scales in R^5."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(5, len(scales))))[0]
    return analytic.LinearGaussian(jnp.asarray(rng.normal(size=5)), basis, jnp.asarray(scales))


def loss_in_closed_form(law, y, level):
    """The denoising loss at a point y of the plane, and the variance of one draw."""
    variances = np.asarray(law.scales) ** 2
    gains = variances / (variances + level**2)
    along = np.asarray(law.basis).T @ (np.asarray(y) - np.asarray(law.mean))
    off = (1 - gains) * along / level
    return np.sum(gains**2) + np.sum(off**2), np.sum(2 * gains**4 + 4 * gains**2 * off**2)


def test_the_denoised_lid_is_the_closed_form_of_the_loss(x64):
    law, num = plane([0.5, 2.0]), 20_000
    x, sigma, level = jnp.asarray(np.random.default_rng(1).normal(size=5)), 0.8, 0.3
    y = law(x, sigma)
    loss, variance = loss_in_closed_form(law, y, level)
    key = jax.random.key(0)
    found = DenoisedLid(level, key, num_samples=num)(law, x, sigma)
    assert abs(found - np.log(loss)) < 4 * np.sqrt(variance / num) / loss
    # It is seen at the denoised point, at a level of its own.
    assert abs(np.log(loss) - np.log(loss_in_closed_form(law, x, level)[0])) > 0.1
    assert abs(np.log(loss) - np.log(loss_in_closed_form(law, y, sigma)[0])) > 0.1

    # With a baseline the difference of two, in which the noise is the same.
    wider = analytic.LinearGaussian(law.mean, law.basis, 2 * law.scales)
    relative = DenoisedLid(level, key, wider, num_samples=num)(law, x, sigma)
    other = lid.denoising_loss(wider, y, level, key=key, num_samples=num, ratio=None).value
    np.testing.assert_allclose(relative, found - jnp.log(other), rtol=1e-9)
    wide_loss, wide_variance = loss_in_closed_form(wider, y, level)
    assert abs(np.log(other) - np.log(wide_loss)) < 4 * np.sqrt(wide_variance / num) / wide_loss
    assert DenoisedLid(level, key, law, num_samples=3)(law, x, sigma) == 0
    again = DenoisedLid(level, key, num_samples=3)(law, x, sigma)
    assert again == DenoisedLid(level, key, num_samples=3)(law, x, sigma)
    assert again != DenoisedLid(level, jax.random.key(1), num_samples=3)(law, x, sigma)


@pytest.mark.parametrize("with_baseline", [False, True])
def test_with_the_spread_it_is_half_of_each_logarithm(x64, with_baseline):
    law, key, level = plane([0.5, 2.0]), jax.random.key(0), 0.3
    x, sigma = jnp.asarray(np.random.default_rng(1).normal(size=5)), 0.8
    y = law(x, sigma)
    wider = analytic.LinearGaussian(law.mean, law.basis, 2 * law.scales)

    def expected(of, num):
        draws = {"key": key, "num_samples": num}
        parts = (
            lid.denoising_loss(of, y, level, ratio=None, **draws),
            lid.denoised_spread(of, y, level, **draws),
        )
        return sum(jnp.log(part.value) for part in parts) / 2

    for num in (2, 40):  # in one chunk, and in two
        measure = DenoisedLid(
            level, key, wider if with_baseline else None, num_samples=num, spread=True
        )
        other = expected(wider, num) if with_baseline else 0
        found = measure(law, x, sigma)
        np.testing.assert_allclose(found, expected(law, num) - other, rtol=1e-9)
    # The closed form of both, by many draws.
    variances = np.asarray(law.scales) ** 2
    spread = np.sum((variances / (variances + level**2)) ** 2)
    loss, variance = loss_in_closed_form(law, y, level)
    num = 20_000
    many = DenoisedLid(level, key, num_samples=num, spread=True)(law, x, sigma)
    error = 4 * np.sqrt(variance / num) / min(loss, spread)
    assert abs(many - (np.log(loss) + np.log(spread)) / 2) < error
    with pytest.raises(ValueError, match="num_samples"):
        DenoisedLid(level, key, num_samples=1, spread=True)(law, x, sigma)


@pytest.mark.parametrize("spread", [False, True])
def test_a_model_that_changes_nothing_has_a_derivative(spread):
    def unmoved(x, sigma):
        return x * 0

    measure = DenoisedLid(0.3, jax.random.key(0), spread=spread)
    value, slope = jax.value_and_grad(lambda x: measure(unmoved, x, 0.5))(jnp.ones(2))
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(slope))


@struct.dataclass
class Scaled:
    """D = c x / (1 + sigma^2)."""

    factor: Any = 1.0

    def condition(self, factor):
        return Scaled(factor)

    def __call__(self, x, sigma):
        return self.factor * x / (1 + sigma**2)


def test_a_condition_is_bound_in_model_and_baseline(x64):
    key, x = jax.random.key(0), jnp.array([0.3, -0.7])
    measure = DenoisedLid(0.4, key, Scaled())
    target = Target(jnp.ones(1), jnp.ones(1))
    bound = LidGuided(Scaled(), target, measure).condition(0.5)
    expected = LidGuided(Scaled(0.5), target, DenoisedLid(0.4, key, Scaled(0.5)))
    np.testing.assert_allclose(bound.log_weight(x, 0.7), expected.log_weight(x, 0.7))
    assert bound.measure(bound.inner, x, 0.7) == 0
    assert DenoisedLid(0.4, key).condition(0.5).baseline is None
    assert JacobianTrace().condition(0.5) == JacobianTrace()


@pytest.mark.parametrize(("num", "spread"), [(1, False), (5, False), (5, True)])
def test_evaluations_are_those_that_happen(num, spread):
    asked = []

    def counting(name):
        def denoiser(x, sigma):
            jax.debug.callback(lambda x: asked.append(name), x, ordered=False)
            return x / (1 + sigma**2)

        return denoiser

    for baseline, expected in ((None, 1 + num), (counting("baseline"), 1 + 2 * num)):
        asked.clear()
        measure = DenoisedLid(0.3, jax.random.key(0), baseline, num_samples=num, spread=spread)
        measure(counting("model"), jnp.ones(3), 1.0).block_until_ready()
        jax.effects_barrier()
        assert len(asked) == measure.evaluations(3) == expected
        assert asked.count("baseline") == (0 if baseline is None else num)
    assert JacobianTrace().evaluations(7) == 8
    assert JacobianTrace(trace=linalg.rademacher(3)).evaluations(7) == 4


@pytest.mark.parametrize("trace", [linalg.exact(), linalg.rademacher(3)])
def test_the_trace_is_that_of_flipd(x64, trace):
    law, key = line_and_atom(), jax.random.key(3)
    for sigma in (0.3, 1.0):
        x = jnp.array([0.4, 0.9])
        found = JacobianTrace(key, trace=trace)(law, x, sigma)
        np.testing.assert_allclose(found, lid.flipd(law, x, sigma, key=key, trace=trace).trace)
        if trace == linalg.exact():
            jacobian = jax.jacfwd(lambda x, sigma=sigma: law(x, sigma))(x)
            np.testing.assert_allclose(found, jnp.trace(jacobian))


def differences(function, x, width=1e-5):
    """Central differences by each coordinate, along the last axis."""
    ahead = np.eye(len(x)) * width
    return np.stack([(function(x + h) - function(x - h)) / (2 * width) for h in ahead], axis=-1)


@pytest.mark.parametrize("tangential", [True, False])
@pytest.mark.parametrize("with_baseline", [True, False])
def test_guidance_steps_along_the_finite_difference_gradient(x64, tangential, with_baseline):
    law, sigma, strength = line_and_atom(), 0.9, 0.7
    baseline = analytic.LinearGaussian(jnp.zeros(2), jnp.eye(2), jnp.ones(2))
    measure = DenoisedLid(0.5, jax.random.key(0), baseline if with_baseline else None)
    x = np.array([0.4, 1.1])
    usual = float(measure(law, jnp.asarray(x), sigma)) + 0.6
    target = Target(jnp.ones(1), jnp.full(1, usual))
    guided = LidGuided(law, target, measure, strength, 1e9, tangential=tangential)

    def log_weight(x):
        return -strength / 2 * max(0.0, usual - measure(law, jnp.asarray(x), sigma)) ** 2

    step = sigma**2 * differences(log_weight, x)
    if tangential:
        step = differences(lambda x: np.asarray(law(jnp.asarray(x), sigma)), x) @ step
    found = guided(jnp.asarray(x), sigma) - law(jnp.asarray(x), sigma)
    assert np.linalg.norm(step) > 0.02
    np.testing.assert_allclose(found, step, rtol=1e-5, atol=1e-8)
    # It raises the dimension.
    ahead = jnp.asarray(x + 0.01 * step / np.linalg.norm(step))
    assert measure(law, ahead, sigma) > measure(law, jnp.asarray(x), sigma)


# Rejection


@struct.dataclass
class FromAtom:
    """How far the denoised point is from the atom, which tells it exactly late on the way."""

    def evaluations(self, size):
        return 3.0

    def __call__(self, denoiser, x, sigma):
        return jnp.linalg.norm(denoiser(x, sigma) - ATOM)

    def condition(self, cond):
        return self


def at(value):
    return Target(jnp.ones(1), jnp.full(1, float(value)))


def select(num=300, key=0, **changed):
    settings = {"sigmas": LEVELS, "measure": FromAtom(), "target": at(1.0), "decide_at": 0.1}
    law = changed.pop("denoiser", line_and_atom())
    return sample_selected(law, num, key=jax.random.key(key), **(settings | changed))


def is_on_atom(points):
    return np.linalg.norm(points - ATOM, axis=1) < 0.5


# The second is like the first, and slower.
STEPS = [
    pytest.param(sample.heun(), id="heun"),
    pytest.param(sample.ancestral(), id="ancestral", marks=pytest.mark.slow),
]


def places(back_to=np.inf, decide_at=0.1):
    levels = np.asarray(LEVELS)
    return int(np.argmax(levels <= back_to)), int(np.sum(levels >= decide_at)) - 1


@pytest.mark.parametrize("step", STEPS)
def test_what_is_accepted_has_the_law_of_the_rest(step):
    found = select(max_tries=30, step=step)
    assert found.accepted.all()
    assert not is_on_atom(found.samples).any()
    rng = np.random.default_rng(0)
    line = np.asarray(line_and_atom().components[0].sample(300, key=jax.random.key(5)))
    assert permutation_p(found.samples, line, rng) > 0.02
    plain = select(max_tries=1, step=step)
    assert permutation_p(plain.samples, line, rng) < 0.02
    # Each try is another draw: a geometric law, of which two in five fail.
    assert abs(found.tries.mean() - 1 / 0.6) < 4 * np.sqrt(0.4 / 300) / 0.6
    twice = np.mean(found.tries[found.tries > 1] > 2)
    assert abs(twice - 0.4) < 4 * np.sqrt(0.24 / np.sum(found.tries > 1))
    # As it is counted by hand: steps, two denoised ends, the measure; and again.
    (back, decide), each = places(), step.evaluations
    more = (found.tries.mean() - 1) * (each * (decide - back) + 1 + 3)
    assert found.evaluations == pytest.approx(each * 23 + 2 + 3 + more)
    assert found.evaluations_again == 0


def test_one_try_gives_what_the_sampler_gives_and_says_which_are_refused():
    law = line_and_atom()
    found = select(num=50, max_tries=1)
    direct = sample.sample(
        law, 50, key=jax.random.key(0), sigma_min=0.02, sigma_max=10.0, num_levels=24
    )
    np.testing.assert_allclose(found.samples, direct, atol=1e-4)
    np.testing.assert_array_equal(found.accepted, ~is_on_atom(np.asarray(direct)))
    assert 5 < found.accepted.sum() < 45
    np.testing.assert_array_equal(found.tries, 1)
    assert found.evaluations == 2 * 23 + 2 + 3
    # The measure is that of the state at the last level not below the one that was asked for.
    _, decide = places()
    assert LEVELS[decide + 1] < 0.1 < LEVELS[decide]
    noise = 10 * jax.random.normal(jax.random.split(jax.random.key(0))[0], (50, 2))
    paths = jax.vmap(lambda x: sample.solve_path(law, x, LEVELS[: decide + 1]))(noise)
    there = np.linalg.norm(paths.denoised[:, -1] - ATOM, axis=1)
    np.testing.assert_allclose(found.measured, there, atol=1e-4)
    last = select(num=50, max_tries=1, decide_at=0.0)
    np.testing.assert_allclose(last.samples, direct, atol=1e-4)
    np.testing.assert_array_equal(last.accepted, found.accepted)


def test_refused_states_get_new_noise_up_to_where_they_go_on_from():
    """A denoiser that moves nothing: each try adds its noise and no more."""
    settings = {
        "denoiser": lambda x, sigma: x, "num": 3, "shape": (3_000,), "target": at(np.inf),
        "measure": JacobianTrace(jax.random.key(0), trace=linalg.rademacher(1)), "back_to": 2.0,
    }  # fmt: skip
    ends = np.stack([select(max_tries=tries, **settings).samples for tries in (1, 2, 3)])
    back, decide = places(back_to=2.0)
    assert 0 < back < decide
    added = np.diff(ends, axis=0)
    expected = np.sqrt(LEVELS[back] ** 2 - LEVELS[decide] ** 2)
    np.testing.assert_allclose(added.std(axis=-1), expected, rtol=4 / np.sqrt(2 * 3_000))
    # Of each row and each try its own, and none that of the start.
    every = np.concatenate([ends[0], *added])
    apart = np.corrcoef(every) - np.eye(9)
    assert np.abs(apart).max() < 5 / np.sqrt(3_000)
    found = select(max_tries=3, **settings)
    assert found.evaluations == pytest.approx(2 * 23 + 2 + 2 + 2 * (2 * (decide - back) + 1 + 2))
    assert not found.accepted.any()


def test_from_a_level_in_the_middle_most_come_back():
    near = select(max_tries=2, back_to=0.5)
    far = select(max_tries=2)
    refused = near.tries == 2
    np.testing.assert_array_equal(refused, far.tries == 2)
    assert np.mean(near.accepted[refused]) < 0.1 < np.mean(far.accepted[refused])
    assert near.evaluations < far.evaluations


def test_refused_states_alone_go_another_way_and_are_measured_by_the_model():
    place = np.array([1.7, 0.0])

    def again(x, sigma):
        return jnp.asarray(place, x.dtype)

    plain, found = select(num=60, max_tries=1), select(num=60, again=again)
    refused = ~plain.accepted
    np.testing.assert_array_equal(found.tries, np.where(refused, 2, 1))
    np.testing.assert_array_equal(found.samples[~refused], plain.samples[~refused])
    assert found.accepted.all()
    assert np.all(np.linalg.norm(found.samples[refused] - place, axis=1) < 0.6)
    assert np.mean(np.linalg.norm(found.samples[~refused] - place, axis=1) < 0.6) < 0.5
    # `again` would give the same distance for all.
    apart = np.linalg.norm(place - ATOM)
    np.testing.assert_allclose(found.measured[refused], apart, atol=0.5)
    assert found.measured[refused].std() > 1e-3
    back, decide = places()
    share = refused.mean()
    assert found.evaluations == pytest.approx(2 * 23 + 2 + 3 * (1 + share))
    assert found.evaluations_again == pytest.approx(share * (2 * (decide - back) + 1))


@struct.dataclass
class Constant:
    """A model whose only point is its condition; a measure of the condition and of that point."""

    where: Any = None

    def evaluations(self, size):
        return 1.0

    def condition(self, where):
        return Constant(where)

    def __call__(self, *args):
        if len(args) == 3:
            denoiser, x, sigma = args
            return denoiser(x, sigma)[0] + 2 * self.where
        return jnp.broadcast_to(self.where, args[0].shape).astype(args[0].dtype)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_each_row_has_its_own_condition(chunk_size):
    where = np.array([3.0, -1.0, 2.0, -4.0, -2.0, 0.5, 7.0], np.float32)
    found = select(
        7, denoiser=Constant(), measure=Constant(), shape=(2,), conditions=where, max_tries=3,
        target=at(0.0), chunk_size=chunk_size, again=Constant(),
    )  # fmt: skip
    np.testing.assert_allclose(found.samples, where[:, None] * np.ones(2), rtol=1e-5)
    np.testing.assert_allclose(found.measured, 3 * where, rtol=1e-5)
    np.testing.assert_array_equal(found.accepted, where >= 0)
    np.testing.assert_array_equal(found.tries, np.where(where >= 0, 1, 3))


@pytest.mark.parametrize("step", STEPS)
def test_the_size_of_chunks_changes_nothing(step):
    one, other = (select(20, step=step, chunk_size=size) for size in (3, 1000))
    np.testing.assert_allclose(one.samples, other.samples, atol=1e-4)
    np.testing.assert_allclose(one.measured, other.measured, atol=1e-4)
    np.testing.assert_array_equal(one.tries, other.tries)
    np.testing.assert_array_equal(one.accepted, other.accepted)
    assert one.evaluations == other.evaluations
    assert np.any(one.tries > 1)
    assert not np.allclose(one.samples, select(20, key=1, step=step).samples, atol=0.1)


def test_what_cannot_be_measured_is_refused():
    @struct.dataclass
    class Nothing(FromAtom):
        def __call__(self, denoiser, x, sigma):
            return jnp.where(x[0] > 0, jnp.nan, 3.0)

    found = select(30, measure=Nothing(), max_tries=2)
    np.testing.assert_array_equal(found.accepted, np.isfinite(found.measured))
    assert np.any(found.tries == 2)
    assert not found.accepted.all()


WRONG = {
    "does not know the shape of a point; pass `shape=`": {"denoiser": lambda x, sigma: x},
    "max_tries=0.*both are at least 1": {"max_tries": 0},
    "num=0.*both are at least 1": {"num": 0},
    r"an array of shape \(3,\) for 4 samples": {"conditions": np.ones(3), "num": 4},
    "first level not above `back_to` must be above": {"back_to": 0.1},
    r"decide_at=20, .*`sigmas` go from 10 to 0.02": {"decide_at": 20.0},
    "back_to=0.001": {"back_to": 0.001},
    r"\(3,\); it takes a vector of two or more noise": {"sigmas": [0.1, 1.0, 10.0]},
    r"has shape \(4,\); .* that decrease": {"sigmas": [10.0, 1.0, 1.0, 0.05]},
    r"has shape \(1,\)": {"sigmas": [10.0]},
    r"has shape \(\)": {"sigmas": 10.0},
    r"has shape \(0,\)": {"sigmas": []},
    "finite positive number": {"sigmas": [10.0, 1.0, 0.0]},
}


@pytest.mark.parametrize("message", WRONG)
def test_rejection_says_what_is_wrong(message):
    with pytest.raises(ValueError, match=message):
        select(**{"num": 4, **WRONG[message]})


def test_rejection_needs_a_key():
    with pytest.raises(TypeError, match="key"):
        sample_selected(
            line_and_atom(), 2, key=None, sigmas=LEVELS, measure=FromAtom(), target=at(1.0),
            decide_at=0.1,
        )  # fmt: skip


# Populations


def test_copies_are_in_proportion_to_weights():
    weights = np.random.default_rng(0).dirichlet(np.full(7, 0.5))
    keys = jax.random.split(jax.random.key(0), 4_000)
    chosen = jax.vmap(lambda key: systematic_resampling(jnp.log(weights) + 3, key=key))(keys)
    counts = np.stack([np.bincount(row, minlength=7) for row in np.asarray(chosen)])
    assert np.all(np.abs(counts - 7 * weights) < 1 + 1e-4)
    share = 7 * weights % 1
    error = np.sqrt(share * (1 - share) / 4_000)
    assert np.all(np.abs(counts.mean(axis=0) - 7 * weights) < 4 * error + 1e-5)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_number_of_copies_is_rounded(log_weights, seed):
    values = np.asarray(log_weights, np.float32)
    chosen = systematic_resampling(jnp.asarray(values), key=jax.random.key(seed))
    num = len(values)
    assert np.all((chosen >= 0) & (chosen < num))
    assert np.all(np.diff(chosen) >= 0)
    exact = np.exp(values.astype(float) - values.max())
    expected = num * exact / exact.sum()
    assert np.all(np.abs(np.bincount(chosen, minlength=num) - expected) < 1 + 1e-4)


def test_particles_of_weight_0_are_not_copied():
    chosen = systematic_resampling(jnp.array([0.0, -jnp.inf, 1.0]), key=jax.random.key(0))
    assert 1 not in chosen.tolist()


VARIANCE, SHORT = 0.8, np.geomspace(4.0, 0.1, 10)


def gaussian(x, sigma):
    return VARIANCE / (VARIANCE + sigma**2) * x


def ahead(mean, variance, sigma, sigma_next):
    """Mean and variance after a step of `ancestral`, linear in x."""
    up = sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)
    down, gain = np.sqrt(sigma_next**2 - up**2), VARIANCE / (VARIANCE + sigma**2)
    slope = gain + down / sigma * (1 - gain)
    return slope * mean, slope**2 * variance + up**2


LINEAR, SQUARE = 0.6, 0.5


def tilt(x, sigma):
    """Linear and quadratic, another one at each level."""
    return (LINEAR * x[0] - SQUARE * x[0] ** 2 / 2) / (1 + sigma**2)


def tilted_law(last):
    """Mean and variance of what comes out, weighted by exp r at the level of this number."""
    mean, variance = 0.0, SHORT[0] ** 2
    for number, sigma in enumerate(SHORT):
        if number == last:
            precision = 1 / variance + SQUARE / (1 + sigma**2)
            mean, variance = (
                (mean / variance + LINEAR / (1 + sigma**2)) / precision,
                1 / precision,
            )
        if number + 1 < len(SHORT):
            mean, variance = ahead(mean, variance, sigma, SHORT[number + 1])
    gain = VARIANCE / (VARIANCE + SHORT[-1] ** 2)
    return gain * mean, gain**2 * variance


def populations(num, size, potential, **settings):
    """`num` populations of `size` each."""
    start_key, key = jax.random.split(jax.random.key(0))
    starts = SHORT[0] * jax.random.normal(start_key, (num, size, 1))

    def one(starts, key):
        return particles(gaussian, starts, SHORT, potential, key=key, **settings)

    return starts, jax.jit(jax.vmap(one))(starts, jax.random.split(key, num))


@pytest.mark.parametrize(
    ("threshold", "low", "high"), [(0.0, 0.0, np.inf), (1.0, 0.0, np.inf), (0.9, 0.5, 2.5)]
)
def test_a_population_has_the_weighted_law(threshold, low, high):
    num, size = 60, 1_000
    _, found = populations(num, size, tilt, threshold=threshold, low=low, high=high)
    drawn = np.asarray(found.samples)[..., 0].astype(float)
    last = int(np.flatnonzero(low <= SHORT)[-1])
    mean, variance = tilted_law(last)
    plain = tilted_law(-1)
    assert mean - plain[0] > 0.15
    assert variance < 0.9 * plain[1]
    # Four standard errors over populations, and a bias of order 1 / K.
    means, squares = drawn.mean(axis=1), ((drawn - mean) ** 2).mean(axis=1)
    for values, expected in ((means, mean), (squares, variance)):
        error = values.std(ddof=1) / np.sqrt(num)
        assert error < 0.02
        assert abs(values.mean() - expected) < 4 * error + 3 / size, (values.mean(), expected)


def test_without_a_potential_all_go_their_own_way():
    starts, found = populations(3, 64, lambda x, sigma: 0.0, threshold=1.0)
    np.testing.assert_array_equal(found.ancestors, np.tile(np.arange(64), (3, 1)))
    np.testing.assert_allclose(found.effective, 64, rtol=1e-4)
    # A step that may have noise, and at these levels has none: what `solve` gives.
    quiet = sample.heun(0.1, low=100.0, high=200.0)
    starts, found = populations(3, 64, lambda x, sigma: 0.0, step=quiet)
    direct = jax.vmap(jax.vmap(lambda x: sample.solve(gaussian, x, jnp.asarray(SHORT))))(starts)
    np.testing.assert_allclose(found.samples, direct, rtol=1e-4, atol=1e-5)
    # With noise each particle has its own.
    one = particles(
        gaussian, jnp.ones((400, 1)), SHORT, lambda x, sigma: 0.0, key=jax.random.key(0)
    )
    assert len(np.unique(one.samples)) == 400
    mean, variance = 1.0, 0.0
    for sigma, sigma_next in itertools.pairwise(SHORT):
        mean, variance = ahead(mean, variance, sigma, sigma_next)
    gain = VARIANCE / (VARIANCE + SHORT[-1] ** 2)
    assert abs(np.mean(one.samples) - gain * mean) < 4 * gain * np.sqrt(variance / 400)
    assert np.var(one.samples) == pytest.approx(gain**2 * variance, rel=4 * np.sqrt(2 / 400))


def test_copies_keep_what_the_step_remembers_of_their_ancestor():
    """A step whose memory is the start itself, and a potential that only one start survives."""

    class Remembering:
        is_stochastic, evaluations = True, 1

        def start(self, x):
            return x

        def __call__(self, denoiser, x, sigma, sigma_next, memory, *, key):
            return sample.Advance(memory + 0 * x, x, (x, sigma), memory)

    starts = jnp.arange(8.0)[:, None]
    found = particles(
        lambda x, sigma: x, starts, [3.0, 2.0, 1.0], lambda x, sigma: -100 * (x[0] - 5) ** 2,
        key=jax.random.key(0), step=Remembering(), low=2.5,
    )  # fmt: skip
    np.testing.assert_array_equal(found.ancestors, 5)
    np.testing.assert_array_equal(found.samples, 5.0)


def test_the_effective_number_is_that_before_any_is_drawn_again():
    starts = SHORT[0] * jax.random.normal(jax.random.key(1), (50, 1))
    options = {"key": jax.random.key(0), "low": SHORT[1]}
    found = particles(gaussian, starts, SHORT, tilt, threshold=0.0, **options)
    weights = np.exp([float(tilt(x, SHORT[0])) for x in starts])
    expected = weights.sum() ** 2 / np.sum(weights**2)
    assert 5 < expected < 49
    np.testing.assert_allclose(found.effective[0], expected, rtol=1e-4)
    assert found.effective[1] < 49
    np.testing.assert_allclose(found.effective[2:], 50, rtol=1e-5)  # drawn again at the last
    assert len(np.unique(found.ancestors)) < 50
    # By a threshold just below and just above it is kept or drawn again there.
    share = expected / 50
    kept, drawn = (
        particles(gaussian, starts, SHORT, tilt, threshold=float(share + change), **options)
        for change in (-1e-3, 1e-3)
    )
    np.testing.assert_array_equal(kept.effective, found.effective)
    assert drawn.effective[0] == found.effective[0]
    assert not np.isclose(drawn.effective[1], found.effective[1])


def test_populations_under_jit_and_vmap_are_those_of_a_loop():
    starts, many = populations(3, 20, tilt)
    keys = jax.random.split(jax.random.split(jax.random.key(0))[1], 3)
    single = jax.jit(lambda starts, key: particles(gaussian, starts, SHORT, tilt, key=key))
    for number in range(3):
        one = single(starts[number], keys[number])
        np.testing.assert_allclose(many.samples[number], one.samples, atol=1e-5)
        np.testing.assert_array_equal(many.ancestors[number], one.ancestors)
        np.testing.assert_allclose(many.effective[number], one.effective, rtol=1e-4)
    # Levels without a value yet; and outside of `jit`.
    traced = jax.jit(lambda levels: particles(gaussian, starts[0], levels, tilt, key=keys[0]))
    np.testing.assert_allclose(traced(SHORT).samples, many.samples[0], atol=1e-5)
    direct = particles(gaussian, starts[0], SHORT, tilt, key=keys[0])
    np.testing.assert_allclose(direct.samples, many.samples[0], atol=1e-5)


def test_whole_numbers_are_starts():
    found = particles(gaussian, np.arange(4)[:, None], [2.0, 1.0], tilt, key=jax.random.key(0))
    assert found.samples.dtype == jnp.float32


def test_particles_say_what_is_wrong():
    starts = jnp.ones((4, 1))
    for wrong, message in (
        ({"step": sample.heun()}, "has no noise: particles that descend from one would stay one"),
        ({"step": sample.dpm_solver_2m()}, "has no noise"),
        ({"threshold": 1.5}, r"threshold=1.5\)` must lie between 0 and 1"),
        ({"sigmas": [0.1, 1.0]}, r"shape \(2,\); it takes a vector of noise levels that decrease"),
        ({"sigmas": 1.0}, r"shape \(\); it takes a vector"),
        ({"sigmas": [1.0, 0.0]}, "finite positive number"),
    ):
        levels = wrong.pop("sigmas", SHORT)
        with pytest.raises(ValueError, match=message):
            particles(gaussian, starts, levels, tilt, key=jax.random.key(0), **wrong)
    with pytest.raises(TypeError, match="key"):
        particles(gaussian, starts, SHORT, tilt, key=None)


def test_guidance_is_finite_where_the_model_gives_back_one_point():
    # All draws of noise come back to the same point: the loss is a rounding error, or 0.
    law = analytic.von_mises_with_atom(0.0, 2.0, 0.3)
    measure = DenoisedLid(0.1, jax.random.key(0), num_samples=8)
    usual = Target(jnp.array([0.05, 5.0]), jnp.array([0.0, 0.0]))
    guided = LidGuided(law, usual, measure, strength=100.0, trust=3.0)
    x = jnp.array([[0.0, 0.0], [1e-3, 0.0], [1e-2, 1e-2], [0.05, 0.0], [0.1, 0.05]])
    levels = jnp.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
    every = jax.vmap(jax.vmap(guided, in_axes=(0, None)), in_axes=(None, 0))
    assert jnp.all(jnp.isfinite(every(x, levels)))
