"""LID guidance on laws whose dimension and its gradient are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mmh_jax import analytic, denoise, linalg, sample
from mmh_jax.mitigation import JacobianTrace, LidGuided, Target, reference_target

FLAT = Target(jnp.array([0.1, 10.0]), jnp.array([0.8, 0.8]))


def two_atoms(x, sigma):
    """At -1 and 1: D = tanh(x / sigma^2), and d = dD/dx = (1 - D^2) / sigma^2."""
    return jnp.tanh(x / sigma**2)


def closed_form(x, sigma, target, strength, tangential):
    mean = np.tanh(x / sigma**2)
    slope = (1 - mean**2) / sigma**2
    gradient = -2 * mean * slope / sigma**2
    step = sigma**2 * strength * max(target - slope, 0) * gradient
    return mean + step * (slope if tangential else 1)


@pytest.mark.parametrize("tangential", [True, False])
@pytest.mark.parametrize(("x", "sigma"), [(0.3, 0.6), (-0.5, 0.5), (0.1, 1.5), (0.05, 0.7)])
def test_the_step_is_that_of_the_closed_form(x64, x, sigma, tangential):
    guided = LidGuided(two_atoms, FLAT, strength=0.3, trust=1e6, tangential=tangential)
    found = guided(jnp.array([x]), sigma)
    np.testing.assert_allclose(found[0], closed_form(x, sigma, 0.8, 0.3, tangential), rtol=1e-6)
    slope = (1 - np.tanh(x / sigma**2) ** 2) / sigma**2
    np.testing.assert_allclose(guided.measure(two_atoms, jnp.array([x]), sigma), slope, rtol=1e-6)
    assert (slope < 0.8) == (abs(found[0] - np.tanh(x / sigma**2)) > 1e-9)


@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_outside_its_levels_it_is_the_denoiser(sigma):
    guided = LidGuided(two_atoms, FLAT, strength=100.0, low=0.3, high=2.0)
    x = jnp.array([0.4])
    np.testing.assert_array_equal(guided(x, sigma), two_atoms(x, sigma))
    assert not np.array_equal(guided(x, 1.5), two_atoms(x, 1.5))


def test_the_step_is_no_longer_than_its_trust():
    x, sigma = jnp.array([0.3, -0.2, 0.7]), 0.6
    denoised = two_atoms(x, sigma)
    high = Target(FLAT.sigmas, jnp.array([30.0, 30.0]))
    for trust in (0.05, 0.3):
        step = LidGuided(two_atoms, high, strength=1e6, trust=trust)(x, sigma) - denoised
        allowed = trust * jnp.linalg.norm(x - denoised)
        np.testing.assert_allclose(jnp.linalg.norm(step), allowed, rtol=1e-4)


def test_it_is_a_denoiser_under_jit_vmap_and_grad():
    guided = LidGuided(
        two_atoms, FLAT, JacobianTrace(jax.random.key(0), trace=linalg.rademacher(2)), 0.5
    )
    points = jnp.linspace(-1, 1, 5)[:, None]
    each = jnp.stack([guided(point, 0.7) for point in points])
    many = jax.jit(jax.vmap(guided, in_axes=(0, None)))(points, 0.7)
    np.testing.assert_allclose(many, each, rtol=1e-5, atol=1e-6)
    # One coordinate: every probe gives the trace itself.
    exact = LidGuided(two_atoms, FLAT, strength=0.5)
    np.testing.assert_allclose(many, jax.vmap(lambda x: exact(x, 0.7))(points), rtol=1e-4)
    slopes = jax.vmap(jax.grad(lambda x: exact(x, 0.7)[0]))(points)
    assert jnp.all(jnp.isfinite(slopes))
    none = LidGuided(two_atoms, FLAT, strength=0.5, trust=0.0)  # a step that is cut to nothing
    x = jnp.array([0.4])
    np.testing.assert_allclose(none(x, 1.5), two_atoms(x, 1.5))
    assert jnp.all(jnp.isfinite(jax.jacfwd(lambda x: none(x, 1.5))(x)))
    # Both branches under a map over levels, and no derivative of the one that is not taken.
    limited = LidGuided(two_atoms, FLAT, strength=0.5, low=0.3, high=2.0)
    levels = jnp.array([0.2, 1.5, 3.0])
    found = jax.vmap(limited, in_axes=(None, 0))(x, levels)
    np.testing.assert_allclose(found, jnp.stack([limited(x, level) for level in levels]), rtol=1e-5)


def test_it_passes_on_what_the_denoiser_knows():
    @struct.dataclass
    class Conditional:
        where: float = 0.0
        shape = (2,)
        trained_range = (0.1, 5.0)

        def condition(self, where):
            return Conditional(where)

        def __call__(self, x, sigma):
            return x / (1 + sigma**2) + self.where

    guided = LidGuided(Conditional(), FLAT)
    assert guided.shape == (2,)
    assert guided.trained_range == (0.1, 5.0)
    assert guided.is_guided
    bound = guided.condition(3.0)
    np.testing.assert_allclose(bound(jnp.ones(2), 0.01) - guided(jnp.ones(2), 0.01), 3.0, rtol=1e-5)


def test_an_interval_of_no_noise_levels_is_refused():
    law = analytic.LinearGaussian(jnp.zeros(2), jnp.eye(2), jnp.ones(2))
    makers = {
        "LidGuided": lambda **ends: LidGuided(law, FLAT, **ends),
        "Guided": lambda **ends: denoise.Guided(law, law, 2.0, **ends),
    }
    for name, make in makers.items():
        for low, high in ((1, 0.2), (jnp.float32(1), np.float64(0.2)), (float("nan"), 0.2)):
            with pytest.raises(ValueError, match=rf"`{name}\(low=.*, high=0.2\)` acts at no.*low"):
                make(low=low, high=high)
        with pytest.raises(ValueError, match="Were the two exchanged"):
            jax.jit(lambda x, make=make: make(low=1.0, high=0.2)(x, 0.5))(jnp.ones(2))
        assert make(low=0.5, high=0.5).low == 0.5
        # Traced ones are not known; stacks, and trees of tangents or axes, are no two numbers.
        call = jax.jit(lambda low, x, make=make: make(low=low, high=0.2)(x, 0.5))
        np.testing.assert_array_equal(call(1.0, jnp.ones(2)), law(jnp.ones(2), 0.5))
        assert make(low=jnp.ones(3), high=jnp.zeros(3)).low.shape == (3,)
        assert jax.tree.map(lambda leaf: -leaf, make(low=0.2, high=1.0)).high == -1
        assert jax.tree.structure(make()) == jax.tree.structure(make(low=jnp.float32(0.1)))


def line_and_atom():
    """A line of spread 1, and a point two off it that has two in five of all draws."""
    line = analytic.LinearGaussian(jnp.zeros(2), jnp.array([[1.0], [0.0]]), jnp.array([1.0]))
    return analytic.Mixture((line, analytic.LinearGaussian.atom([0.0, 2.0])), [0.6, 0.4])


def test_samples_leave_an_atom_for_the_line():
    law = line_and_atom()
    levels = sample.karras_levels(24, sigma_min=0.02, sigma_max=10.0)
    starts = levels[0] * jax.random.normal(jax.random.key(0), (400, 2))

    def end(denoiser):
        run = jax.jit(jax.vmap(lambda x: sample.solve(denoiser, x, levels)))
        return np.asarray(run(starts))

    paths = jax.jit(jax.vmap(lambda x: sample.solve_path(law, x, levels)))(starts)
    plain = np.asarray(paths.denoised[:, -1])
    on_atom = np.linalg.norm(plain - np.array([0.0, 2.0]), axis=1) < 0.1
    assert abs(on_atom.mean() - 0.4) < 0.1
    measure = JacobianTrace()
    dims = jax.jit(
        jax.vmap(lambda states: jax.lax.map(lambda at: measure(law, *at), (states, levels)))
    )(paths.states)
    target = reference_target(levels, np.asarray(dims)[~on_atom], quantile=0.5)
    shares = []
    for tangential in (True, False):
        guided = LidGuided(
            law, target, strength=100.0, trust=3.0, low=0.1, high=3.0, tangential=tangential
        )
        found = end(guided)
        left = np.linalg.norm(found - np.array([0.0, 2.0]), axis=1) < 0.1
        shares.append(left.mean() / on_atom.mean())
        # What leaves it is of the line, not of nowhere, and those that were there stay there.
        assert np.mean(np.abs(found[~left, 1]) < 0.05) > 0.97
        assert not np.any(left & ~on_atom)
    assert shares[0] < 0.75, shares
    assert shares[1] < 0.4, shares
    # A target that nothing is below changes nothing.
    none = LidGuided(law, Target(levels, jnp.zeros_like(levels)), strength=100.0, trust=3.0)
    np.testing.assert_allclose(end(none), plain, rtol=1e-4, atol=1e-4)


def test_a_further_run_is_below_the_target_as_often_as_it_says():
    rng = np.random.default_rng(0)
    below = []
    for _ in range(2_000):
        dims = rng.gamma(3, size=(20, 1))
        target = reference_target([1.0], dims[:19], quantile=0.1)
        below.append(dims[19, 0] < target(1.0))
    share, error = np.mean(below), np.sqrt(0.1 * 0.9 / 2_000)
    assert abs(share - 0.1) < 4 * error


def test_targets_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"have shapes \(2,\) and \(3, 1\)"):
        reference_target([1.0, 0.1], np.ones((3, 1)))
    with pytest.raises(ValueError, match="there are 3 runs"):
        reference_target([1.0], np.ones((3, 1)), quantile=0.1)
    with pytest.raises(ValueError, match="different positive noise levels"):
        reference_target([1.0, 1.0], np.ones((30, 2)), quantile=0.5)
    with pytest.raises(ValueError, match="not finite"):
        reference_target([1.0], np.array([[1.0], [np.nan]]), quantile=0.5)
