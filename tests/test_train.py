"""The loss, the loop, and that a run cut off ends like one that was not."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmh_jax import denoise, lid, nn, train
from mmh_jax.train.loop import _batches

CONFIG = train.TrainConfig(num_steps=60, batch_size=32, steps_per_round=10, ema_half_life=10.0)


def untrained(seed=0, **options):
    network = nn.ResidualMLP((2,), width=32, depth=1, rngs=nnx.Rngs(seed), **options)
    apply, params = nn.split(network)
    return denoise.precondition(apply, params, sigma_data=1.0, shape=(2,))


def circle(num=100):
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, num)
    return np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def last(iterator):
    for metrics in iterator:
        result = metrics
    return result


def test_noise_levels_follow_their_law():
    key = jax.random.key(0)
    levels = jnp.sort(train.log_uniform(0.01, 10.0)(1000, key=key))
    # Stratified: the empirical distribution function is within one stratum of the true one.
    uniform = jnp.log(levels / 0.01) / jnp.log(1000.0)
    assert jnp.max(jnp.abs(uniform - (jnp.arange(1000) + 0.5) / 1000)) <= 0.51 / 1000
    logs = jnp.log(train.log_normal(-1.2, 0.7)(4000, key=key))
    np.testing.assert_allclose([logs.mean(), logs.std()], [-1.2, 0.7], atol=0.01)


@pytest.mark.parametrize("law", [train.log_normal(-1.0, 1.4), train.log_uniform(0.1, 2.0)])
def test_the_last_of_a_large_batch_is_finite(law, monkeypatch):
    # The largest number below 1 that is drawn: with 511 before it, it rounds to 512.
    top = lambda key, shape, **_: jnp.full(shape, 1 - 2.0**-23, jnp.float32)  # noqa: E731
    monkeypatch.setattr(jax.random, "uniform", top)
    levels = law(512, key=jax.random.key(0))
    assert np.isfinite(levels).all()
    assert levels[-1] > levels[-2]


def test_loss_of_a_known_denoiser(x64):
    # D = 0 errs by x0; D = x errs by sigma eps.
    x0, sigma = jnp.array([3.0, 4.0]), jnp.asarray(0.5)
    weight = (0.25 + 4.0) / (0.5 * 2.0) ** 2
    assert train.edm_weight(0.5, 2.0) == weight
    keys = jax.random.split(jax.random.key(0), 20_000)

    def loss(denoiser):
        one = jax.vmap(lambda key: train.denoising_loss(denoiser, x0, sigma, 2.0, key=key))
        return one(keys)

    np.testing.assert_allclose(loss(lambda x, s: 0 * x), weight * 12.5, rtol=1e-12)
    errors = loss(lambda x, s: x)
    stderr = errors.std() / np.sqrt(errors.size)
    assert abs(errors.mean() - weight * 0.25) < 4 * stderr


def test_symmetry_loss_is_the_skew_part_of_the_jacobian(x64):
    matrix = jax.random.normal(jax.random.key(1), (5, 5))
    x0, sigma = jnp.ones(5), jnp.asarray(0.5)

    def losses(matrix, num=20_000):
        keys = jax.random.split(jax.random.key(0), num)
        return jax.lax.map(
            lambda key: train.symmetry_loss(lambda x, s: matrix @ x, x0, sigma, 2.0, key=key), keys
        )

    skew = (matrix - matrix.T) / 2
    expected = train.edm_weight(0.5, 2.0) * 4.0 * jnp.sum(skew**2) / 5
    found = losses(matrix)
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(found.size)
    np.testing.assert_allclose(losses(matrix + matrix.T, 3), 0, atol=1e-12)


def test_symmetry_is_trained_when_asked_for():
    config = dataclasses.replace(CONFIG, num_steps=200, batch_size=64, learning_rate=4e-3)

    def asymmetry(symmetry):
        asked = dataclasses.replace(config, symmetry=symmetry)
        state = last(train.fit(untrained(), circle(), asked, key=jax.random.key(0))).state
        model = untrained().replace(params=state.params)
        points = jnp.asarray(circle(40))
        found = jax.vmap(lambda x: lid.jacobian_spectrum(model, x, 0.3).asymmetry)(points)
        return float(found.mean())

    assert asymmetry(10.0) < 0.6 * asymmetry(0.0)


def test_fingerprints_know_every_setting_and_outlive_new_ones():
    points = circle()
    print_of = functools.partial(train.run_fingerprint, points)
    assert print_of(CONFIG) != print_of(dataclasses.replace(CONFIG, symmetry=0.5))
    assert print_of(CONFIG) != print_of(dataclasses.replace(CONFIG, learning_rate=2e-3))
    # What a run begun with an earlier version had written down.
    assert "symmetry" not in repr(CONFIG)
    recipe = train.Recipe()
    assert {"network", "symmetry"}.isdisjoint(recipe.settings())
    assert dataclasses.replace(recipe, symmetry=0.5).settings()["symmetry"] == 0.5
    assert dataclasses.replace(recipe, network="GradientMLP").settings()["network"] == "GradientMLP"


@pytest.mark.parametrize("num_points", [7, 32, 100])
def test_an_epoch_visits_every_point_equally(num_points):
    indices = _batches(num_points, CONFIG, jax.random.key(0))
    assert indices.shape == (CONFIG.steps_per_epoch(num_points), 32)
    counts = np.bincount(np.asarray(indices).reshape(-1), minlength=num_points)
    assert counts.max() - counts.min() <= 1
    other = _batches(num_points, CONFIG, jax.random.key(1))
    assert not np.array_equal(indices, other)


def test_training_learns_the_circle():
    config = dataclasses.replace(
        CONFIG, num_steps=600, batch_size=128, steps_per_round=200, learning_rate=4e-3
    )
    points, key = circle(), jax.random.key(0)
    losses = []
    for metrics in train.fit(untrained(), points, config, key=key):
        losses.append(metrics.loss)
    state = metrics.state
    assert losses[-1] < 0.92 * losses[0]
    model = untrained().replace(params=state.ema)
    noisy = jnp.array([2.0, 0.0])
    # The exact denoiser pulls a point at radius 2 back to the circle, of radius sqrt 2.
    assert abs(jnp.linalg.norm(model(noisy, 0.2)) - 2**0.5) < 0.25


def test_a_run_continued_is_a_run_not_interrupted():
    points, key = circle(), jax.random.key(3)
    whole = last(train.fit(untrained(), points, CONFIG, key=key)).state
    iterator = train.fit(untrained(), points, CONFIG, key=key)
    next(iterator)
    half = jax.tree.map(jnp.array, next(iterator).state)
    resumed = last(train.fit(untrained(), points, CONFIG, key=key, state=half)).state
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(whole.step) == CONFIG.num_epochs(100) * CONFIG.steps_per_epoch(100)


def test_parts_of_an_epoch_are_the_epoch():
    points, key = circle(3200), jax.random.key(3)  # a hundred steps in an epoch
    whole = dataclasses.replace(CONFIG, num_steps=200, steps_per_round=100)
    parts = dataclasses.replace(whole, steps_per_round=30)
    expected = last(train.fit(untrained(), points, whole, key=key)).state
    iterator = train.fit(untrained(), points, parts, key=key)
    found = [next(iterator) for _ in range(2)]
    half = jax.tree.map(jnp.array, found[-1].state)
    rest = list(train.fit(untrained(), points, parts, key=key, state=half))
    steps = [metrics.step for metrics in found + rest]
    assert steps == [30, 60, 90, 100, 130, 160, 190, 200]
    assert int(rest[-1].state.epoch) == 2
    short = dataclasses.replace(parts, num_steps=110)
    assert short.total_steps(3200) == 110
    assert last(train.fit(untrained(), points, short, key=key)).step == 110
    assert dataclasses.replace(CONFIG, num_steps=110).total_steps(100) == 111
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(rest[-1].state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_ema_is_the_documented_average(x64):
    points = circle()
    config = dataclasses.replace(CONFIG, num_steps=6, steps_per_round=1)
    model = untrained()
    average = jax.tree.map(np.asarray, model.params)
    for number, metrics in enumerate(train.fit(model, points, config, key=jax.random.key(0))):
        assert metrics.step == number + 1
        rate = max(1 - 0.5 ** (1 / config.ema_half_life), 9 / (10 + number))
        average = jax.tree.map(
            lambda old, new, rate=rate: old + rate * (np.asarray(new) - old),
            average, metrics.state.params,
        )  # fmt: skip
    for a, b in zip(*map(jax.tree.leaves, (metrics.state.ema, average)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    one = dataclasses.replace(config, num_steps=1, batch_size=100)
    start = jax.tree.map(np.array, model.params)
    state = last(train.fit(model, points, one, key=jax.random.key(0))).state
    rate = 9 / 10
    for a, b, c in zip(*map(jax.tree.leaves, (start, state.params, state.ema)), strict=True):
        np.testing.assert_allclose(c, a + rate * (b - a), rtol=1e-5, atol=1e-7)


def test_frozen_features_do_not_move():
    model = untrained(num_frequencies=4)
    start = np.array(model.params["directions"][...])
    state = last(train.fit(model, circle(), CONFIG, key=jax.random.key(0))).state
    np.testing.assert_array_equal(state.params["directions"][...], start)
    moved = np.asarray(state.params["enter"]["kernel"][...])
    assert not np.array_equal(moved, np.asarray(model.params["enter"]["kernel"][...]))


def test_checkpoints_round_trip_and_refuse_another_run(tmp_path):
    points, key = circle(), jax.random.key(3)
    model = untrained()
    fingerprint = train.run_fingerprint(points, CONFIG, seed=0)
    iterator = train.fit(model, points, CONFIG, key=key)
    with train.Checkpoints(tmp_path / "c", fingerprint) as checkpoints:
        assert checkpoints.latest(train.init_state(model, CONFIG)) is None
        state = next(iterator).state
        checkpoints.save(state)
        checkpoints.save(state)
        expected = jax.tree.map(np.array, state)
    with train.Checkpoints(tmp_path / "c", fingerprint) as checkpoints:
        restored = checkpoints.latest(train.init_state(model, CONFIG))
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    other = train.run_fingerprint(points + 1, CONFIG, seed=0)
    assert other != fingerprint
    with (
        train.Checkpoints(tmp_path / "c", other) as checkpoints,
        pytest.raises(ValueError, match="other data or settings"),
    ):
        checkpoints.latest(train.init_state(model, CONFIG))


def test_errors():
    with pytest.raises(ValueError, match=r"shape \(3,\).*takes \(2,\)"):
        next(train.fit(untrained(), np.zeros((5, 3)), CONFIG, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="batch_size=0"):
        train.TrainConfig(batch_size=0)
    with pytest.raises(FloatingPointError, match="learning rate"):
        last(train.fit(untrained(), np.full((5, 2), np.nan), CONFIG, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="constant"):
        train.normalisation(np.ones((4, 2), np.float32))


def test_normalisation_is_isotropic():
    points = np.random.default_rng(0).normal(size=(1000, 3)) * [1, 2, 3] + [5, 0, -5]
    shift, scale = train.normalisation(points)
    normalised = (points - shift) / scale
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.mean(normalised**2), 1, rtol=1e-6)
    np.testing.assert_allclose(points.std(0) / normalised.std(0), scale, rtol=1e-5)


def test_recipe_trains_saves_resumes_and_loads(tmp_path):
    recipe = train.Recipe(width=16, depth=1, num_steps=40, batch_size=32)
    points = circle() * 3 + 1
    seen = []

    def killed(step, total, loss):
        seen.append(step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    quick = dataclasses.replace(recipe, num_steps=1000)
    with pytest.raises(KeyboardInterrupt):
        train.train_model(points, quick, tmp_path / "a", seed=0, save_every=0.0, progress=killed)
    resumed_from = []
    a = train.train_model(
        points, quick, tmp_path / "a", seed=0, progress=lambda s, *_: resumed_from.append(s)
    )
    assert resumed_from[0] == seen[0] + seen[0]
    b = train.train_model(points, quick, tmp_path / "b", seed=0)
    x = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(a(x, 0.3), b(x, 0.3))
    np.testing.assert_array_equal(train.load(tmp_path / "a")(x, 0.3), a(x, 0.3))
    again = train.train_model(points, quick, tmp_path / "a", seed=0)
    np.testing.assert_array_equal(again(x, 0.3), a(x, 0.3))
    with pytest.raises(ValueError, match="another run"):
        train.train_model(points, quick, tmp_path / "a", seed=1)


def test_a_conservative_recipe_is_trained_saved_and_loaded(tmp_path):
    recipe = train.Recipe(
        width=16, depth=1, num_steps=30, batch_size=32, network="GradientMLP", symmetry=0.1
    )
    model = train.train_model(circle(), recipe, tmp_path, seed=0)
    found = train.load(tmp_path)
    x = jnp.array([1.0, 0.4])
    np.testing.assert_array_equal(found(x, 0.3), model(x, 0.3))
    assert lid.jacobian_spectrum(found, x, 0.3).asymmetry < 1e-5
    config = train.load_config(tmp_path)
    assert config.network == "GradientMLP"
    assert config.training["symmetry"] == 0.1
    with pytest.raises(ValueError, match="another run"):
        train.train_model(circle(), dataclasses.replace(recipe, symmetry=0.0), tmp_path, seed=0)
    with pytest.raises(ValueError, match="symmetry=-1"):
        train.TrainConfig(symmetry=-1)


def test_a_network_narrower_than_a_point_has_too_many_tangent_directions():
    module = nn.ResidualMLP((10,), width=4, depth=2, rngs=nnx.Rngs(0))
    module.leave.kernel[...] = jax.random.normal(jax.random.key(0), (4, 10))
    denoiser = denoise.precondition(*nn.split(module), sigma_data=1.0, shape=(10,))
    for seed in range(5):
        x = jax.random.normal(jax.random.key(seed), (10,))
        count = lid.rank_by_threshold(lid.jacobian_spectrum(denoiser, x, 0.3).eigenvalues)
        assert count >= 10 - 4
    recipe = train.Recipe(width=4, depth=1, num_steps=2, batch_size=4)
    assert recipe.wide_enough(10).width == 13
    assert recipe.wide_enough(3) == recipe
    assert recipe.wide_enough(10**6).width == 2048


def test_training_warns_of_a_narrow_network(tmp_path):
    recipe = train.Recipe(width=4, depth=1, num_steps=2, batch_size=4)
    points = np.random.default_rng(0).normal(size=(8, 2, 3))
    with pytest.warns(UserWarning, match=r"width 4 on points of 6 coordinates.*at least 2"):
        train.train_model(points, recipe, tmp_path / "narrow", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.train_model(points, recipe.wide_enough(6), tmp_path / "wide", seed=0)
