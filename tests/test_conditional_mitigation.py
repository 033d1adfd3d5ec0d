"""Attribution, perturbation, optimisation and guidance on token-conditional models made by hand.

D_c(x) = A x + B m + (u . m) M x with m = sum_i w_i e_i, and D_0(x) = A x: every criterion and its
gradient by m are known, and that by e_i is w_i times as long.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from mmh_jax import denoise, linalg, mitigation, sample
from mmh_jax import memorization as mem

RNG = np.random.default_rng(0)
LENGTH, SIZE, DIM, SIGMA = 4, 3, 5, 0.7
A, M = RNG.normal(size=(2, DIM, DIM))
B = RNG.normal(size=(DIM, SIZE))
U = RNG.normal(size=SIZE)
WEIGHTS = np.array([0.5, -2.0, 0.0, 1.0])
TOKENS = RNG.normal(size=(LENGTH, SIZE))
X = RNG.normal(size=DIM)


@struct.dataclass
class Bilinear:
    weights: Any
    a: Any
    b: Any
    u: Any
    m: Any
    tokens: Any = None

    def condition(self, tokens):
        return self.replace(tokens=tokens)

    def __call__(self, x, sigma):
        if self.tokens is None:
            return self.a @ x
        mean = self.weights @ self.tokens
        return self.a @ x + self.b @ mean + (self.u @ mean) * (self.m @ x)


def model():
    return Bilinear(*(jnp.asarray(each) for each in (WEIGHTS, A, B, U, M)))


# The criteria and their gradients by m, in NumPy, from their definitions.
MEAN = WEIGHTS @ TOKENS
C = U @ MEAN
R = B @ MEAN + C * M @ X  # D_c - D_0
BY_MEAN = B + np.outer(M @ X, U)  # d D_c / dm
OFF = X - A @ X - R  # x - D_c
MR = M @ R
TRACE = np.trace(A) + C * np.trace(M)
EXPECTED = {
    "cfg_norm": (
        mem.cfg_norm,
        np.linalg.norm(R) / SIGMA,
        BY_MEAN.T @ R / np.linalg.norm(R) / SIGMA,
    ),
    "score_norm": (
        mitigation.score_norm_criterion,
        np.linalg.norm(OFF) / SIGMA,
        -BY_MEAN.T @ OFF / np.linalg.norm(OFF) / SIGMA,
    ),
    "sharpness": (
        mem.sharpness,
        C**2 * MR @ MR / SIGMA**2,
        2 * (C * (MR @ MR) * U + C**2 * BY_MEAN.T @ M.T @ MR) / SIGMA**2,
    ),
    "trace": (mitigation.flipd_criterion(), -TRACE, -np.trace(M) * U),
    "flipd": (
        mitigation.flipd_criterion(residual=True),
        -(TRACE + OFF @ OFF / SIGMA**2),
        -np.trace(M) * U + 2 * BY_MEAN.T @ OFF / SIGMA**2,
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_blame_is_its_closed_form(x64, name):
    criterion, value, by_mean = EXPECTED[name]
    found = criterion(model().condition(TOKENS), model().condition(None), X, SIGMA)
    np.testing.assert_allclose(found, value, rtol=1e-9)
    blame = mitigation.attribute(model(), TOKENS, X, SIGMA, criterion=criterion)
    np.testing.assert_allclose(blame, np.abs(WEIGHTS) * np.linalg.norm(by_mean), rtol=1e-6)
    assert blame[2] == 0


def test_blame_under_jit_and_vmap_is_a_loop(x64):
    def one(tokens, x, sigma):
        return mitigation.attribute(model(), tokens, x, sigma, criterion=mem.cfg_norm)

    prompts, points = RNG.normal(size=(3, LENGTH, SIZE)), RNG.normal(size=(3, DIM))
    levels = jnp.array([0.1, 1.0, 10.0])
    many = jax.jit(jax.vmap(one))(prompts, points, levels)
    each = [one(*args) for args in zip(prompts, points, levels, strict=True)]
    np.testing.assert_allclose(many, np.stack(each), rtol=1e-9)


def test_a_stochastic_trace_has_its_own_key_at_each_call(x64):
    def blame(key):
        criterion = mitigation.flipd_criterion(trace=linalg.rademacher(8), key=key)
        return mitigation.attribute(model(), TOKENS, X, SIGMA, criterion=criterion)

    def factor(key):
        criterion = mitigation.flipd_criterion(trace=linalg.rademacher(8), key=key)
        return -criterion(model().condition(TOKENS), None, X, SIGMA)

    keys = jax.random.split(jax.random.key(0), 1000)
    traces = np.asarray(jax.jit(jax.vmap(factor))(keys))
    assert abs(traces.mean() - TRACE) < 4 * traces.std() / 1000**0.5
    np.testing.assert_array_equal(blame(keys[0]), blame(keys[0]))
    assert not np.allclose(blame(keys[0]), blame(keys[1]))


def test_a_trajectory_averages_shares(x64):
    states, levels = RNG.normal(size=(3, DIM)), np.array([5.0, 0.5, 0.01])
    gates = np.array([[1.0, 0.0], [1.0, 3.0], [0.0, 0.0]])

    @struct.dataclass
    class Gated:
        """Of its two tokens those act that the state opens; the size is that of 1 / sigma^2."""

        tokens: Any = None

        def condition(self, tokens):
            return self.replace(tokens=tokens)

        def __call__(self, x, sigma):
            if self.tokens is None:
                return 0 * x
            return x[:2] @ self.tokens / sigma + 0 * x

    shaped = np.concatenate([gates, np.zeros((3, DIM - 2))], axis=1)
    tokens = RNG.normal(size=(2, DIM))
    found = mitigation.attribute_along(Gated(), tokens, shaped, levels, criterion=mem.cfg_norm)
    # Shares (1, 0), (1/4, 3/4), and (0, 0) where nothing acts.
    np.testing.assert_allclose(found, [1.25 / 3, 0.75 / 3], rtol=1e-9)
    one = mitigation.attribute_along(model(), TOKENS, states, levels, criterion=mem.cfg_norm)
    np.testing.assert_allclose(one, np.abs(WEIGHTS) / 3.5, rtol=1e-9)
    jitted = jax.jit(
        lambda s: mitigation.attribute_along(model(), TOKENS, s, levels, criterion=mem.sharpness)
    )
    np.testing.assert_allclose(jitted(states), np.abs(WEIGHTS) / 3.5, rtol=1e-9)


def attentive(trigger):
    """The model with weights of attention to the trigger."""

    @struct.dataclass
    class Attentive:
        inner: Any

        def condition(self, tokens):
            if tokens is None:
                return self.inner.condition(None)
            return self.inner.replace(
                weights=jax.nn.softmax(10 * tokens @ trigger), tokens=jnp.asarray(tokens)
            )

    return Attentive(model())


@pytest.mark.parametrize("name", EXPECTED)
def test_the_trigger_is_found_and_masked(x64, name):
    criterion = EXPECTED[name][0]
    vocabulary = np.linalg.qr(RNG.normal(size=(SIZE, SIZE)))[0]
    prompts = vocabulary[RNG.integers(1, SIZE, size=(8, LENGTH))]
    places = RNG.integers(LENGTH, size=8)
    prompts[np.arange(8), places] = vocabulary[0]
    network = attentive(vocabulary[0])
    for prompt, place, key in zip(
        prompts, places, jax.random.split(jax.random.key(0), 8), strict=True
    ):
        blame = mitigation.attribute(network, prompt, X, SIGMA, criterion=criterion)
        assert jnp.argmax(blame) == place
        assert jnp.sort(blame)[-2] < 0.1 * blame[place]
        chosen = mitigation.choose_tokens(blame, 1, key=key, temperature=0.05, floor=1e-6)
        assert chosen.tolist() == [place]


# Choosing places


def test_places_are_drawn_by_the_exact_law():
    """Ordered pairs without replacement: p_i p_j / (1 - p_i)."""
    blame, num = np.array([3.0, 2.9, 2.7, 0.0]), 40_000
    weights = np.exp(blame / 0.3) / np.exp(blame / 0.3).sum() + 0.05
    share = weights / weights.sum()
    keys = jax.random.split(jax.random.key(0), num)
    drawn = jax.vmap(
        lambda key: mitigation.choose_tokens(
            blame, 2, key=key, temperature=0.1, floor=0.05, scale=3.0
        )
    )(keys)
    count = np.zeros((4, 4))
    np.add.at(count, tuple(np.asarray(drawn).T), 1)
    assert not np.any(np.diag(count))
    for i, j in itertools.permutations(range(4), 2):
        expected = share[i] * share[j] / (1 - share[i])
        error = (expected * (1 - expected) / num) ** 0.5
        assert abs(count[i, j] / num - expected) < 4 * error, (i, j)


def test_units_of_blame_do_not_matter_unless_told():
    blame = jnp.array([0.2, 1.0, 0.95, 0.0, 0.6])
    keys = jax.random.split(jax.random.key(1), 200)

    def drawn(blame, **options):
        return jax.vmap(lambda key: mitigation.choose_tokens(blame, 3, key=key, **options))(keys)

    np.testing.assert_array_equal(drawn(blame), drawn(1e-4 * blame))
    np.testing.assert_array_equal(drawn(blame), drawn(1e4 * blame))
    np.testing.assert_array_equal(drawn(blame), drawn(blame, scale=1.0))
    assert np.mean(drawn(blame)[:, 0] == 3) < 0.05
    assert np.mean(drawn(1e-4 * blame, scale=1.0)[:, 0] == 3) > 0.1  # all are alike
    alike = drawn(jnp.zeros(5))[:, 0]
    assert np.all(np.bincount(alike, minlength=5) > 20)


def test_only_allowed_places_are_drawn():
    allowed = np.array([False, True, True, False, True])
    keys = jax.random.split(jax.random.key(2), 100)
    drawn = jax.jit(
        jax.vmap(
            lambda key: mitigation.choose_tokens(
                jnp.array([9.0, 0.0, 0.0, 0.0, 0.0]), 3, key=key, allowed=allowed
            )
        )
    )(keys)
    assert set(np.unique(drawn)) == {1, 2, 4}
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    traced = jax.jit(lambda blame: mitigation.choose_tokens(blame, 2, key=keys[0]))
    assert traced(jnp.array([1.0, jnp.nan, 0.0])).tolist() == [-1, -1]


# Perturbing


def test_the_nearest_other_token(x64):
    vocabulary = RNG.normal(size=(20, SIZE))
    tokens = vocabulary[[3, 3, 11, 7]]
    distances = np.linalg.norm(vocabulary[:, None] - tokens, axis=2)
    distances[[3, 3, 11, 7], np.arange(4)] = np.inf
    expected = tokens.copy()
    expected[[3, 1]] = vocabulary[np.argmin(distances, axis=0)[[3, 1]]]
    rewriter = mitigation.nearest_tokens(np.concatenate([vocabulary, vocabulary]))  # and twins
    found = mitigation.perturb(tokens, [3, 1], rewriter, key=None)
    np.testing.assert_array_equal(found, expected)
    jitted = jax.jit(lambda t, p, r: mitigation.perturb(t, p, r, key=None))
    np.testing.assert_array_equal(jitted(tokens, jnp.array([3, 1]), rewriter), expected)
    # Of a token that is in no vocabulary, the nearest of all.
    moved = mitigation.perturb(tokens + 1e-6, [2], rewriter, key=None)
    np.testing.assert_array_equal(moved[2], tokens[2])


def test_random_tokens_are_others_and_all_alike():
    vocabulary = np.eye(4, dtype=np.float32)
    keys = jax.random.split(jax.random.key(0), 3_000)
    drawn = jax.vmap(
        lambda key: mitigation.perturb(
            vocabulary, [0, 2], mitigation.random_tokens(vocabulary), key=key
        )
    )(keys)
    np.testing.assert_array_equal(
        drawn[:, [1, 3]], np.broadcast_to(np.eye(4)[[1, 3]], (3000, 2, 4))
    )
    for place in (0, 2):
        count = np.asarray(drawn[:, place].sum(axis=0))
        assert count[place] == 0
        assert np.all(abs(np.delete(count, place) - 1000) < 4 * (3000 * 2 / 9) ** 0.5)
    pairs = np.argmax(drawn[:, 0], 1) == np.argmax(drawn[:, 2], 1)  # two of nine, if independent
    assert abs(pairs.mean() - 2 / 9) < 4 * (2 / 9 * 7 / 9 / 3000) ** 0.5


def test_nothing_but_the_places_changes():
    def all_of_them(tokens, places, *, key):
        return tokens + 1

    found = mitigation.perturb(TOKENS, [1], all_of_them, key=None)
    changed = np.any(found != jnp.asarray(TOKENS), axis=1)
    assert changed.tolist() == [False, True, False, False]
    wrong = jax.jit(lambda at: mitigation.perturb(TOKENS, at, all_of_them, key=None))
    assert jnp.all(jnp.isnan(wrong(jnp.array([-1]))))
    assert jnp.all(jnp.isnan(wrong(jnp.array([4]))))
    assert not jnp.any(jnp.isnan(wrong(jnp.array([3]))))


# Optimising


def by_hand(loss, start, optimizer, num_steps):
    """The iterates and values of a plain loop."""
    point, values, points = jnp.asarray(start), [], []
    state, slope = optimizer.init(point), jax.jit(jax.grad(loss))
    for _ in range(num_steps):
        values.append(loss(point))
        points.append(point)
        updates, state = optimizer.update(slope(point), state, point)
        point = optax.apply_updates(point, updates)
    return np.array([*values, loss(point)]), np.array([*points, point])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_condition_falls_and_its_history_is_true(x64, name):
    criterion, network = EXPECTED[name][0], model()
    null = network.condition(None)

    def loss(tokens):
        return criterion(network.condition(tokens), null, X, SIGMA)

    values, points = by_hand(loss, TOKENS, optax.adamw(0.05), 12)
    run = jax.jit(
        lambda tokens, bound: mitigation.optimise_condition(
            network, tokens, X, SIGMA, criterion=criterion, num_steps=12, stop_below=bound
        )
    )
    found = run(TOKENS, -jnp.inf)
    np.testing.assert_allclose(found.history, values, rtol=1e-9)
    np.testing.assert_allclose(found.value, points[-1], rtol=1e-9)
    assert found.history[-1] < found.history[0]
    bound = values[4] + 1e-9
    first = int(np.argmax(values <= bound))
    assert first > 0
    stopped = run(TOKENS, bound)
    np.testing.assert_allclose(stopped.value, points[first], rtol=1e-9)
    np.testing.assert_allclose(stopped.history[: first + 1], values[: first + 1], rtol=1e-9)
    np.testing.assert_allclose(stopped.history[first:], values[first], rtol=1e-9)


def test_no_step_is_the_criterion_alone(x64):
    found = mitigation.optimise_condition(
        model(), TOKENS, X, SIGMA, criterion=mem.cfg_norm, num_steps=0
    )
    np.testing.assert_array_equal(found.value, TOKENS)
    np.testing.assert_allclose(found.history, [EXPECTED["cfg_norm"][1]], rtol=1e-9)


TURN = np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0]
# Not far apart: the gradient at the minimum is then mostly along z.
GAINS = np.array([1.0, 1.1, 1.2, 1.3, 1.5])
DIFFERENCE = TURN @ np.diag(GAINS) @ TURN.T


def pulled(x, sigma):
    return (A + DIFFERENCE) @ x


def unpulled(x, sigma):
    return A @ x


@pytest.mark.parametrize(("criterion", "power"), [(mem.cfg_norm, 1), (mem.sharpness, 4)])
def test_noise_turns_to_the_least_direction_and_keeps_its_length(x64, criterion, power):
    """|E z|, and |E^2 z|^2, are least where z is the last eigenvector of E."""
    noise = RNG.normal(size=DIM)
    length = np.linalg.norm(noise)
    optimizer = optax.adam(optax.exponential_decay(0.1, 100, 0.3))
    found = mitigation.optimise_noise(
        pulled, unpulled, noise, SIGMA, criterion=criterion, optimizer=optimizer, num_steps=800
    )
    least = length * GAINS[0] if power == 1 else (length * GAINS[0] ** 2) ** 2
    np.testing.assert_allclose(found.history[-1], least, rtol=5e-3)
    np.testing.assert_allclose(abs(found.value @ TURN[:, 0]) / length, 1, rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(found.value), length, rtol=1e-12)
    final = criterion(pulled, unpulled, SIGMA * found.value, SIGMA)
    np.testing.assert_allclose(found.history[-1], final, rtol=1e-12)


def test_noise_at_its_minimum_stays_and_each_step_keeps_the_length(x64):
    there = 2 * TURN[:, 0]
    # Adam makes steps of rounding, and comes back; its step along the whole gradient leads away.
    found = mitigation.optimise_noise(
        pulled, unpulled, there, SIGMA, criterion=mem.cfg_norm, num_steps=200
    )
    assert found.history[-1] < 1.01 * found.history[0]
    assert found.value @ there / 4 > 0.9995
    noise = RNG.normal(size=DIM)
    for num_steps in (1, 2, 5):
        moved = mitigation.optimise_noise(
            pulled, unpulled, noise, SIGMA, criterion=mem.cfg_norm, num_steps=num_steps
        ).value
        assert np.linalg.norm(moved - noise) > 0.01
        np.testing.assert_allclose(np.linalg.norm(moved), np.linalg.norm(noise), rtol=1e-12)
    stopped = mitigation.optimise_noise(
        pulled, unpulled, noise, SIGMA, criterion=mem.cfg_norm, stop_below=jnp.inf
    )
    np.testing.assert_array_equal(stopped.value, noise)


def test_optimising_many_is_a_loop(x64):
    def one(noise):
        return mitigation.optimise_noise(
            pulled, unpulled, noise, SIGMA, criterion=mem.sharpness, num_steps=5, stop_below=3.0
        )

    many = RNG.normal(size=(4, DIM))
    found = jax.jit(jax.vmap(one))(many)
    for index, noise in enumerate(many):
        alone = one(noise)
        np.testing.assert_allclose(found.value[index], alone.value, rtol=1e-9)
        np.testing.assert_allclose(found.history[index], alone.history, rtol=1e-9)


# The switch


LEVELS = 2.0 ** np.arange(3, -4, -1)


@pytest.mark.parametrize(
    ("curve", "place", "found"),
    [
        ([7, 5, 3, 2, 3, 1, 0], 3, True),
        ([1, 5, 6, 4, 2, 3, 1], 4, True),  # a rise before the fall
        ([7, 5, 5, 3, 3, 4, 0], 4, True),  # a ledge in the fall, a flat minimum: its end
        ([7, 6, 5, 4, 3, 2, 1], 6, False),
        ([1, 2, 3, 4, 5, 6, 7], 6, False),
        ([1, 1, 1, 1, 1, 1, 1], 6, False),
        ([7, 6, 5, 4, 3, 2, 3], 5, True),
        ([7, 6, 7, 1, 7, 0, 7], 1, True),
    ],
)
def test_guidance_begins_where_the_first_fall_ends(x64, curve, place, found):
    order = np.argsort(LEVELS)

    def conditional(x, sigma):
        size = jnp.interp(sigma, LEVELS[order], np.array(curve, float)[order])
        return unpulled(x, sigma) + sigma * size * jnp.eye(DIM)[0]

    run = jax.jit(lambda x: mitigation.guidance_switch(conditional, unpulled, x, LEVELS))
    switch = run(X)
    np.testing.assert_allclose(switch.norms, curve, atol=1e-9)
    assert switch.level == LEVELS[place]
    assert bool(switch.found) == found


@pytest.mark.parametrize("step", [sample.heun(), sample.ancestral(), sample.dpm_solver_2m()])
def test_the_run_is_unguided_and_the_guided_one_follows_it(x64, step):
    gaussian = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731
    conditional = lambda x, sigma: jnp.tanh(3 * x) / (1 + sigma**2)  # noqa: E731
    key = jax.random.key(0) if step.is_stochastic else None
    starts = 8 * RNG.normal(size=(4, DIM))

    def one(x):
        return mitigation.guidance_switch(conditional, gaussian, x, LEVELS, step=step, key=key)

    many = jax.vmap(one)(starts)
    for index, start in enumerate(starts):
        path = sample.solve_path(gaussian, start, jnp.asarray(LEVELS), step=step, key=key)
        norms = mem.cfg_norm_along(conditional, gaussian, path)
        np.testing.assert_allclose(many.norms[index], norms, rtol=1e-9)
        np.testing.assert_allclose(many.level[index], one(start).level)
        level = LEVELS[3]
        late = denoise.Guided(conditional, gaussian, 5.0, high=level, outside=0.0)
        guided = sample.solve_path(late, start, jnp.asarray(LEVELS), step=step, key=key)
        before = 4 if step.evaluations == 1 else 3  # Heun's step looks ahead
        np.testing.assert_allclose(guided.states[:before], path.states[:before], rtol=1e-9)
        assert not np.allclose(guided.states[-1], path.states[-1])


def test_a_failed_norm_has_no_level():
    def failing(x, sigma):
        return jnp.where(sigma < 0.3, jnp.nan, 0) * x

    found = mitigation.guidance_switch(failing, lambda x, sigma: x, jnp.ones(2), LEVELS)
    assert jnp.isnan(found.level)
    assert jnp.isnan(found.norms).tolist() == [False] * 5 + [True] * 2


# Rescaled guidance and clamped steps


@pytest.mark.parametrize("amount", [0.0, 0.4, 1.0])
def test_rescaled_is_the_formula(x64, amount):
    network = model()
    guided = denoise.Guided(network.condition(TOKENS), network.condition(None), 6.0)
    conditional, null = A @ X + R, A @ X
    answer = null + 6 * (conditional - null)
    rescaled = answer * conditional.std() / answer.std()
    expected = amount * rescaled + (1 - amount) * answer
    found = mitigation.Rescaled(guided, amount)
    np.testing.assert_allclose(found(X, SIGMA), expected, rtol=1e-9)
    jitted = jax.jit(lambda denoiser, x: denoiser(x, SIGMA))
    np.testing.assert_allclose(jitted(found, X), expected, rtol=1e-9)
    points = RNG.normal(size=(3, DIM))
    many = jax.vmap(found, in_axes=(0, None))(points, SIGMA)
    np.testing.assert_allclose(many, [found(x, SIGMA) for x in points], rtol=1e-9)
    if amount == 1:
        np.testing.assert_allclose(found(X, SIGMA).std(), conditional.std(), rtol=1e-9)
    rebound = found.condition(2 * TOKENS)(X, SIGMA)
    other = denoise.Guided(network.condition(2 * TOKENS), network.condition(None), 6.0)
    np.testing.assert_allclose(rebound, mitigation.Rescaled(other, amount)(X, SIGMA), rtol=1e-9)


def test_rescaled_asks_once_and_only_where_guidance_is():
    asked = []

    def conditional(x, sigma):
        asked.append("c")
        return 2 * x

    def null(x, sigma):
        asked.append("0")
        return x

    guided = denoise.Guided(conditional, null, 4.0, low=0.2, high=0.5, outside=0.0)
    found = mitigation.Rescaled(guided, 1.0)
    x = jnp.array([1.0, -2.0, 4.0])
    np.testing.assert_allclose(found(x, 0.4), 2 * x, rtol=1e-6)
    assert sorted(asked) == ["0", "c"]
    for sigma in (0.1, 0.6):
        np.testing.assert_allclose(found(x, sigma), x, rtol=1e-6)
    flat = mitigation.Rescaled(denoise.Guided(conditional, null, 4.0), 1.0)
    np.testing.assert_allclose(flat(jnp.ones(3), 0.4), 5.0)
    assert jnp.all(jnp.isfinite(jax.jacrev(lambda x: flat(x, 0.4))(jnp.ones(3))))
    assert denoise.is_guided(found)
    with pytest.raises(TypeError, match=r"is a LidGuided; pass a `denoise\.Guided`"):
        mitigation.Rescaled(mitigation.LidGuided(guided, None), 1.0)(x, 0.4)


STEPS = {
    "ddim": sample.ddim(),
    "ancestral": sample.ancestral(),
    "dpm": sample.dpm_solver_2m(),
    "heun": sample.heun(),
    "churn": sample.heun(0.2),
}
ROWS = jnp.array([1.0, 1.3, 0.4, 2.0])


def atoms(x, sigma):
    return jnp.tanh(x / sigma**2)


@pytest.mark.parametrize("name", STEPS)
def test_no_limit_is_the_step_itself(name):
    step, levels = STEPS[name], jnp.geomspace(5.0, 0.1, 5)
    reference = mem.StepReference(ROWS, jnp.array([0.1, 0.0, 0.2, 0.1]))
    key = jax.random.key(0) if step.is_stochastic else None
    free = mitigation.clamped(step, reference, jnp.inf)
    assert (free.is_stochastic, free.evaluations) == (step.is_stochastic, step.evaluations)
    x = 5 * jax.random.normal(jax.random.key(1), (3,))
    run = jax.jit(lambda step, x: sample.solve_path(atoms, x, levels, step=step, key=key))
    plain = jax.jit(lambda x: sample.solve_path(atoms, x, levels, step=step, key=key))(x)
    found = run(free, x)
    np.testing.assert_allclose(found.states, plain.states, rtol=1e-6)
    np.testing.assert_allclose(found.denoised, plain.denoised, rtol=1e-6)
    held = run(mitigation.clamped(step, mem.StepReference(ROWS / 8, ROWS), 0.125), x)
    assert np.max(np.abs(held.states - plain.states)) > 0.1
    if name != "churn":  # whose states are raised by noise after each step
        sizes, before = mem.step_sizes(held.states), mem.step_sizes(plain.states)
        assert np.any(before > ROWS / 4)
        assert np.all(sizes <= ROWS / 4 * (1 + 1e-5))


def test_clamped_steps_are_those_of_a_plain_loop(x64):
    levels = np.geomspace(5.0, 0.1, 5)
    mean, std, limit = np.array([1.0, 9.0, 0.4, 0.01]), np.array([0.1, 0.5, 0.0, 0.02]), 1.5
    step = mitigation.clamped(sample.ddim(), mem.StepReference(mean, std), limit)
    starts = 5 * RNG.normal(size=(3, 4))
    run = jax.jit(jax.vmap(lambda x: sample.solve_path(atoms, x, jnp.asarray(levels), step=step)))
    found = run(starts)
    ends = jax.jit(jax.vmap(lambda x: sample.solve(atoms, x, jnp.asarray(levels), step=step)))
    clamped = []
    for index, start in enumerate(starts):
        x, states = start, [start]
        for number in range(4):
            sigma, below = levels[number], levels[number + 1]
            denoised = np.tanh(x / sigma**2)
            move = denoised + below / sigma * (x - denoised) - x
            allowed = mean[number] + limit * std[number]
            if (size := np.linalg.norm(move)) > allowed:
                move = move * allowed / size
                clamped.append((index, number, allowed))
            x = x + move
            states.append(x)
        np.testing.assert_allclose(found.states[index], states, rtol=1e-9)
        np.testing.assert_allclose(ends(starts)[index], np.tanh(x / levels[-1] ** 2), rtol=1e-9)
    for index, number, allowed in clamped:
        size = mem.step_sizes(found.states[index])[number]
        np.testing.assert_allclose(size, allowed, rtol=1e-9)
    assert {number for _, number, _ in clamped} == {0, 2, 3}


def test_what_a_multistep_remembers_is_its_own(x64):
    """After a clamped step it goes on with the denoiser's answer before, from where x is now."""
    levels = np.array([4.0, 2.0, 1.0])
    reference = mem.StepReference(np.array([0.5, 99.0]), np.zeros(2))
    step = mitigation.clamped(sample.dpm_solver_2m(), reference, 0.0)
    x = jnp.array([6.0, -3.0])
    states = sample.solve_path(atoms, x, jnp.asarray(levels), step=step).states
    inner = sample.dpm_solver_2m()
    first = inner(atoms, x, levels[0], levels[1], inner.start(x), key=None)
    moved = x + 0.5 * (first.x - x) / jnp.linalg.norm(first.x - x)
    second = inner(atoms, moved, levels[1], levels[2], first.memory, key=None)
    np.testing.assert_allclose(states, jnp.stack([x, moved, second.x]), rtol=1e-9)


def test_a_run_longer_than_the_reference_fails_visibly():
    step = mitigation.clamped(sample.ddim(), mem.StepReference(ROWS, ROWS), 3.0)
    x = jnp.array([5.0, 2.0])
    exact = sample.solve(atoms, x, jnp.geomspace(5.0, 0.1, 5), step=step)
    longer = sample.solve(atoms, x, jnp.geomspace(5.0, 0.1, 6), step=step)
    assert jnp.all(jnp.isfinite(exact))
    assert jnp.all(jnp.isnan(longer))
    negative = mitigation.clamped(sample.ddim(), mem.StepReference(ROWS, ROWS), -9.0)
    still = sample.solve_path(atoms, x, jnp.geomspace(5.0, 0.1, 5), step=negative).states
    np.testing.assert_array_equal(still, jnp.broadcast_to(x, (5, 2)))


# What is wrong with an argument


def test_errors_name_the_cure():
    key = jax.random.key(0)

    def pointwise(conditional, unconditional, x, sigma):
        return conditional(x, sigma)

    with pytest.raises(ValueError, match=r"tokens=...\)` has shape \(2, 4, 3\).*jax.vmap"):
        mitigation.attribute(model(), np.ones((2, 4, 3)), X, SIGMA, criterion=mem.cfg_norm)
    with pytest.raises(TypeError, match="tokens are embeddings"):
        mitigation.attribute(model(), np.ones((4, 3), int), X, SIGMA, criterion=mem.cfg_norm)
    with pytest.raises(ValueError, match=r"criterion=...\)` returns shape \(5,\)"):
        mitigation.attribute(model(), TOKENS, X, SIGMA, criterion=pointwise)
    with pytest.raises(ValueError, match=r"shapes \(5,\) and \(3,\)"):
        mitigation.attribute_along(model(), TOKENS, X, np.ones(3), criterion=mem.cfg_norm)
    with pytest.raises(TypeError, match="needs a key"):
        mitigation.flipd_criterion(trace=linalg.rademacher(4))(unpulled, unpulled, X, SIGMA)
    for blame, k, options, says in (
        ([[1.0]], 1, {}, "has shape"),
        ([1.0, -1.0], 1, {}, "negative or not finite"),
        ([1.0, np.nan], 1, {}, "negative or not finite"),
        ([1.0, 2.0], 3, {}, "there are 2 tokens"),
        ([1.0, 2.0], 0, {}, "there are 2 tokens"),
        ([1.0, 2.0], 2, {"allowed": [True, False]}, "there are 1 tokens"),
        ([1.0, 2.0], 1, {"allowed": [True]}, "says of each of the 2 tokens"),
        ([1.0, 2.0], 1, {"temperature": 0.0}, "temperature=0.0"),
        ([1.0, 2.0], 1, {"floor": 0.0}, "floor=0.0"),
    ):
        with pytest.raises(ValueError, match=says):
            mitigation.choose_tokens(np.array(blame), k, key=key, **options)
    with pytest.raises(TypeError, match="needs a key"):
        mitigation.choose_tokens(np.ones(2), 1, key=None)


def test_errors_of_rewriters_and_optimisers_name_the_cure():
    mask = mitigation.mask(np.zeros(SIZE))
    for places, error, says in (
        ([4], ValueError, "places are 0 to 3"),
        ([-1], ValueError, "places are 0 to 3"),
        ([1.0], TypeError, "places are integers"),
        ([[1]], ValueError, r"takes \(k,\) places"),
    ):
        with pytest.raises(error, match=says):
            mitigation.perturb(TOKENS, np.array(places), mask, key=None)
    with pytest.raises(ValueError, match="these tokens have"):
        mitigation.perturb(TOKENS, [0], mitigation.mask(np.zeros(2)), key=None)
    with pytest.raises(ValueError, match="of size 2; these tokens are of size 3"):
        mitigation.perturb(TOKENS, [0], mitigation.nearest_tokens(np.zeros((4, 2))), key=None)
    with pytest.raises(TypeError, match="take `nearest_tokens`"):
        mitigation.perturb(TOKENS, [0], mitigation.random_tokens(TOKENS), key=None)
    with pytest.raises(ValueError, match="at least 2"):
        mitigation.random_tokens(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="returns all tokens"):
        mitigation.perturb(TOKENS, [0], lambda t, p, *, key: t[:1], key=None)
    with pytest.raises(ValueError, match="is 0 everywhere"):
        mitigation.optimise_noise(pulled, unpulled, np.zeros(DIM), SIGMA, criterion=mem.cfg_norm)
    with pytest.raises(ValueError, match="num_steps=-1"):
        mitigation.optimise_condition(
            model(), TOKENS, X, SIGMA, criterion=mem.cfg_norm, num_steps=-1
        )
    with pytest.raises(ValueError, match="vector of noise levels"):
        mitigation.guidance_switch(pulled, unpulled, X, 1.0)
    for mean, std, limit, says in (
        (np.ones(2), np.ones(3), 1.0, r"shapes \(2,\) and \(3,\)"),
        (np.array([1.0, np.nan]), np.ones(2), 1.0, "mean that is negative or not finite"),
        (np.ones(2), np.array([1.0, -1.0]), 1.0, "std that is negative or not finite"),
        (np.ones(2), np.ones(2), np.nan, "one number of standard deviations"),
        (np.ones(2), np.ones(2), np.ones(2), "one number of standard deviations"),
    ):
        with pytest.raises(ValueError, match=says):
            mitigation.clamped(sample.ddim(), mem.StepReference(mean, std), limit)
