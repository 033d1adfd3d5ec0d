"""Both dimensions and the verdict from each source of LID_*, on models that are known exactly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, lid, train
from mmh_jax.data.splits import Halves, disjoint_halves
from mmh_jax.memorization import (
    Label,
    Verdict,
    check_halves,
    cross_fit,
    diffusion_curve,
    diffusion_lid,
    explain,
    neighbor_lid,
    verdict,
)
from mmh_jax.typing import Estimate

KEY = jax.random.key(0)
NUM, COPIES = 400, 60
SIGMAS = jnp.geomspace(1e-4, 0.02, 12)
POPULATION = analytic.von_mises_with_atom()


def toy_curve(denoiser, x):
    """FLIPD of an exact denoiser, in closed form."""
    value = jax.vmap(denoiser.flipd, (None, 0))(x, SIGMAS)
    answer = jax.vmap(denoiser, (None, 0))(x, SIGMAS)
    residual = jnp.sum((x - answer) ** 2, axis=1) / SIGMAS**2
    return lid.Curve(SIGMAS, value, jnp.zeros_like(value), residual)


def flipd_curve(denoiser, x):
    return lid.flipd_curve(denoiser, x, SIGMAS)


def share(labels, expected):
    return np.mean(np.asarray(labels) == expected)


@pytest.fixture(scope="module")
def toy():
    """Draws of the circle, and the origin many times."""
    circle = np.asarray(analytic.von_mises(0.0, 2.0).sample(NUM, key=KEY))
    return np.concatenate([circle, np.zeros((COPIES, 2), np.float32)])


@pytest.fixture(scope="module")
def memorized(toy):
    """Draws of the circle that are far from each other beside the noise levels."""
    angle = np.arctan2(*toy[:NUM].T[::-1])
    return np.argsort(angle)[10::20]


@pytest.fixture(scope="module")
def rows(memorized):
    """Those, some others of the circle, and two of the atom's."""
    others = np.setdiff1d(np.arange(NUM), memorized)[::19]
    return np.concatenate([memorized, others, [NUM, NUM + COPIES - 1]])


MEMORIZED, OTHERS, ATOM = slice(0, 20), slice(20, -2), slice(-2, None)


def memory_of(points):
    """A model that knows the law, and half of whose mass are points that it has memorized."""
    parts = (POPULATION, analytic.Empirical(jnp.asarray(points)))
    return analytic.Mixture(parts, jnp.array([0.5, 0.5]))


def read(denoiser, points):
    """LID_theta as `cross_fit` reads it, by hand."""
    curves = jax.jit(jax.vmap(toy_curve, (None, 0)))(denoiser, points)
    found = lid.at_plateau(curves, ambient_dim=2)
    return Estimate(found.value, found.stderr)


SOURCES = {"neighbors": neighbor_lid, "diffusion": diffusion_lid}


@pytest.fixture(scope="module")
def lid_theta(toy, memorized, rows):
    """Of the model of the law, and of one that has memorized a part."""
    models = {"law": POPULATION, "memory": memory_of(toy[memorized])}
    return {name: read(model, toy[rows]) for name, model in models.items()}


@pytest.mark.parametrize("source", SOURCES)
def test_truth_table_of_circle_and_atom(toy, rows, lid_theta, source):
    lid_star = SOURCES[source](toy, rows=rows)
    assert np.all(lid_star.value[ATOM] == 0)
    assert np.all(lid_star.stderr[ATOM] == 0)
    assert np.nanmedian(lid_star.value[:-2]) == pytest.approx(1, abs=0.15)
    law, memory = (verdict(lid_theta[name], lid_star).label for name in ("law", "memory"))
    known = np.isfinite(lid_star.value)
    assert known.mean() > 0.75  # the diffusion has no plateau at some of the points
    assert share(law[ATOM], Label.DD_MEM) == share(memory[ATOM], Label.DD_MEM) == 1
    assert share(memory[MEMORIZED][known[MEMORIZED]], Label.OD_MEM) >= 0.95
    for labels in (law, memory):
        # A z-score in forty is a false alarm, and that of the diffusion takes its curve for exact.
        others = labels[OTHERS][known[OTHERS]]
        assert share(others, Label.NOT_MEMORIZED) >= (0.95 if source == "neighbors" else 0.7)


def test_truth_table_by_twins(toy, rows, memorized):
    halves = disjoint_halves(toy, key=KEY)
    memories = [memory_of(toy[np.intersect1d(half, memorized)]) for half in halves]
    found = cross_fit(*memories, toy, halves, toy_curve, rows=rows)
    np.testing.assert_allclose(found.lid_theta.value[MEMORIZED], 0, atol=0.02)
    np.testing.assert_allclose(found.lid_star.value[:-2], 1, atol=0.02)
    np.testing.assert_allclose(found.lid_star.value[ATOM], 0, atol=0.02)
    expected = np.full(len(rows), Label.NOT_MEMORIZED)
    expected[MEMORIZED], expected[ATOM] = Label.OD_MEM, Label.DD_MEM
    np.testing.assert_array_equal(found.verdict.label, expected)
    assert found.curve_theta.value.shape == found.curve_star.value.shape == (len(rows), 12)
    assert not found.off_manifold.any()
    # Twins that both know the law and nothing more.
    expected[MEMORIZED] = Label.NOT_MEMORIZED
    law = cross_fit(POPULATION, POPULATION, toy, halves, toy_curve, rows=rows)
    np.testing.assert_array_equal(law.verdict.label, expected)
    # A model of all the data, in place of the twin that saw the point.
    audited = cross_fit(*memories, toy, halves, toy_curve, rows=rows, model=POPULATION)
    np.testing.assert_array_equal(audited.verdict.label, expected)


def test_duplicates_in_both_halves_are_refused(toy):
    mixed = Halves(np.arange(0, len(toy), 2), np.arange(1, len(toy), 2))
    with pytest.raises(ValueError, match=r"equal points in both halves \(1 times\)"):
        cross_fit(POPULATION, POPULATION, toy, mixed, toy_curve)
    halves = disjoint_halves(toy, key=KEY)
    in_first = check_halves(toy, halves)
    assert len(set(in_first[NUM:])) == 1
    # Near-duplicates, by their clusters.
    near = np.concatenate([toy[:50], toy[:50] + 1e-4])
    groups = lid.find_duplicates(near, tolerance=1e-3).cluster
    in_first = check_halves(near, disjoint_halves(near, key=KEY, groups=groups), groups=groups)
    np.testing.assert_array_equal(in_first[:50], in_first[50:])
    with pytest.raises(ValueError, match="groups in both halves"):
        check_halves(near, Halves(np.arange(50), np.arange(50, 100)), groups=groups)


def test_what_repeats_is_an_atom_whatever_the_twin_says(toy):
    """The twin that never saw the atom does not know of it."""
    halves = disjoint_halves(toy, key=KEY)
    has_atom = np.isin(NUM, halves.first)
    circle = analytic.Mixture((analytic.von_mises(0.0, 2.0),) * 2, jnp.ones(2))
    twins = (POPULATION, circle) if has_atom else (circle, POPULATION)
    rows = np.array([0, NUM])
    found = cross_fit(*twins, toy, halves, toy_curve, rows=rows)
    labels = [Label.NOT_MEMORIZED, Label.DD_MEM]
    np.testing.assert_array_equal(found.verdict.label, labels)
    assert found.lid_star.value[1] == found.lid_star.stderr[1] == 0
    assert not found.off_manifold.any()
    alone = cross_fit(*twins, toy, halves, toy_curve, rows=rows, atoms=np.zeros(len(toy), bool))
    np.testing.assert_array_equal(alone.verdict.label, [Label.NOT_MEMORIZED, Label.UNDECIDED])
    np.testing.assert_array_equal(alone.off_manifold, [False, True])


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("source", SOURCES)
def test_duplicates_have_no_dimension_and_change_no_other(source, tolerance):
    plane = np.random.default_rng(0).normal(size=(300, 3)) @ np.eye(3, 6)
    # The first five are far from each other; each comes again, a little displaced.
    copies = np.repeat(plane[:5], 30, axis=0) + np.random.default_rng(1).normal(size=(150, 6)) * (
        tolerance / 100
    )
    levels = {"sigmas": np.geomspace(0.1, 1, 12)} if source == "diffusion" else {}
    alone = SOURCES[source](plane, **levels)
    # In front, so that rows and numbers of different points are not the same.
    every = np.concatenate([copies, plane])
    found = SOURCES[source](every, tolerance=tolerance, **levels)
    np.testing.assert_array_equal(found.value[:155], 0)
    np.testing.assert_allclose(found.value[155:], alone.value[5:], rtol=1e-3)
    np.testing.assert_allclose(found.stderr[155:], alone.stderr[5:], rtol=1e-2, atol=1e-4)
    some = SOURCES[source](every, rows=np.array([0, 167]), tolerance=tolerance, **levels)
    np.testing.assert_allclose(some.value, [0, alone.value[17]], rtol=1e-3)


def test_the_answer_at_a_point_does_not_depend_on_what_else_is_asked():
    plane = np.random.default_rng(0).normal(size=(300, 3)) @ np.eye(3, 6)
    whole, some = diffusion_curve(plane), diffusion_curve(plane, rows=np.arange(7))
    np.testing.assert_array_equal(whole.sigmas, some.sigmas)
    np.testing.assert_allclose(whole.value[:7], some.value, rtol=1e-5)


def test_all_duplicates():
    points = np.repeat(np.eye(4), 2, axis=0)
    assert np.all(neighbor_lid(points).value == 0)
    assert np.all(diffusion_lid(points, sigmas=[0.1, 0.2, 0.3, 0.4]).value == 0)
    assert np.all(diffusion_curve(points).value == 0)
    with pytest.raises(ValueError, match="pass `sigmas`"):
        diffusion_curve(points[:2])


def test_neighbor_lid_is_the_estimator_at_the_neighbours():
    plane = np.random.default_rng(0).normal(size=(200, 3)) @ np.eye(3, 6)
    found = neighbor_lid(plane, rows=np.arange(9), num_neighbors=12, estimator=lid.mom)
    expected = jax.vmap(lid.mom)(lid.nearest_neighbors(plane, 12).distances[:9])
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(found.stderr, expected.stderr, rtol=1e-5)


def test_diffusion_curve_leaves_each_point_out():
    plane = np.random.default_rng(0).normal(size=(200, 3)) @ np.eye(3, 6)
    sigmas = np.geomspace(0.1, 1, 5)
    found = diffusion_curve(plane, rows=np.arange(20, 30), sigmas=sigmas)
    expected = lid.closed_form_curve(plane, sigmas)
    np.testing.assert_allclose(found.value, expected.value[20:30], rtol=1e-4)
    with pytest.raises(ValueError, match="one row number"):
        lid.closed_form_curve(plane, sigmas, queries=plane[:3], exclude=np.arange(2))
    with pytest.raises(ValueError, match="row numbers"):
        diffusion_curve(plane, rows=np.array([200]))


@pytest.fixture(scope="module")
def shapes():
    """A line among points of six dimensions, in R^8, and its exact denoiser."""
    basis = jnp.eye(8)
    parts = (
        analytic.LinearGaussian(jnp.zeros(8), basis[:, :1], jnp.array([1.0])),
        analytic.LinearGaussian(jnp.full(8, 3.0), basis[:, 1:7], jnp.ones(6)),
    )
    points = np.concatenate([part.sample(200, key=KEY) for part in parts])
    return analytic.Mixture(parts, jnp.array([0.5, 0.5])), points


def test_a_low_dimensional_shape_is_data_driven(shapes):
    law, points = shapes
    rows = np.arange(0, 400, 10)
    line = rows < 200
    halves = disjoint_halves(points, key=KEY)
    twins = cross_fit(law, law, points, halves, flipd_curve, rows=rows, small=1.5)
    labels = np.asarray(twins.verdict.label)
    assert np.all(labels[line] == Label.DD_MEM)
    assert np.all(labels[~line] == Label.NOT_MEMORIZED)
    np.testing.assert_allclose(twins.lid_star.value, np.where(line, 1, 6), atol=0.1)
    by_neighbors = verdict(twins.lid_theta, neighbor_lid(points, rows=rows), small=1.5)
    # The neighbours know a line by 25%: most of it is small, and nothing else is.
    assert share(by_neighbors.label[line], Label.DD_MEM) > 0.85
    assert not np.any(np.asarray(by_neighbors.label)[~line] == Label.DD_MEM)


def spectral_curve(denoiser, x):
    return lid.spectral_curve(denoiser, x, jnp.geomspace(1e-4, 1e-3, 6))


def test_a_point_off_the_twins_manifold_is_undecided():
    """Twins that have memorized their halves say nothing of other points at a small scale."""
    line = (np.random.default_rng(0).normal(size=(60, 1)) @ np.ones((1, 3))).astype(np.float32)
    halves = disjoint_halves(line, key=KEY)
    memories = [analytic.Empirical(jnp.asarray(line[half])) for half in halves]
    found = cross_fit(*memories, line, halves, spectral_curve)
    apart = lid.nearest_neighbors(line, 1).distances[:, 0] > 0.02
    assert np.all(np.asarray(found.verdict.label)[apart] == Label.UNDECIDED)
    assert np.all(found.off_manifold[apart])
    np.testing.assert_allclose(found.lid_theta.value[apart], 0, atol=1e-3)
    # The trap: an empty Jacobian looks like a point mass in the data.
    blind = cross_fit(*memories, line, halves, spectral_curve, max_residual=None)
    assert share(np.asarray(blind.verdict.label)[apart], Label.DD_MEM) > 0.9
    # With one noise level and FLIPD, the residual is in the value.
    at_one = cross_fit(*memories, line, halves, lambda d, x: lid.flipd(d, x, 1e-3))
    assert np.all(np.isnan(at_one.lid_star.value[apart]))


def test_twins_of_memory_see_the_law_at_a_larger_scale():
    line = (np.random.default_rng(0).normal(size=(600, 1)) @ np.ones((1, 3))).astype(np.float32)
    halves = disjoint_halves(line, key=KEY)
    memories = [analytic.Empirical(jnp.asarray(line[half])) for half in halves]
    rows = np.flatnonzero(abs(line[:, 0]) < 1)[:60]
    sigmas = jnp.geomspace(1e-4, 0.5, 24)
    found = cross_fit(
        *memories, line, halves, lambda d, x: lid.flipd_curve(d, x, sigmas), rows=rows
    )
    known = np.isfinite(found.lid_star.value)
    assert known.mean() > 0.6  # 300 points: not every curve has a plateau
    assert np.median(found.lid_star.value[known]) == pytest.approx(1, abs=0.1)
    assert share(np.asarray(found.verdict.label)[known], Label.OD_MEM) > 0.9


def noisy(seed, x):
    """A LID of 5, and an error of 1 that differs from twin to twin and is not in the stderr."""
    key = jax.random.fold_in(jax.random.key(seed), x[0].astype(int))
    return Estimate(5 + jax.random.normal(key), jnp.zeros(()))


def test_what_twins_disagree_about_is_in_the_errors():
    points = np.arange(6000.0)[:, None]
    halves = disjoint_halves(points[:4000], key=KEY)
    arguments = (jnp.int32(1), jnp.int32(2), points[:4000], halves, noisy)
    found = cross_fit(*arguments, held_out=points[4000:])
    # The variance of 2,000 squared normal numbers: 1.6% of their root.
    assert found.disagreement == pytest.approx(2**0.5, rel=0.06)
    np.testing.assert_allclose(found.lid_star.stderr, found.disagreement / 2**0.5)
    rate = share(found.verdict.label, Label.OD_MEM)
    assert abs(rate - 0.025) < 4 * np.sqrt(0.025 * 0.975 / 4000)
    # Without them half of all points are called memorized.
    blind = cross_fit(*arguments)
    assert blind.disagreement == 0
    assert share(blind.verdict.label, Label.OD_MEM) == pytest.approx(0.5, abs=0.04)


def test_what_the_twins_explain_is_not_counted_twice():
    points = np.arange(3000.0)[:, None]
    halves = disjoint_halves(points[:1000], key=KEY)

    def honest(seed, x):
        return Estimate(noisy(seed, x).value, jnp.ones(()))

    twins = (jnp.int32(1), jnp.int32(2))
    found = cross_fit(*twins, points[:1000], halves, honest, held_out=points[1000:])
    assert found.disagreement < 0.5


def test_keys_are_the_same_for_both():
    points = np.arange(10.0)[:, None]
    halves = disjoint_halves(points, key=KEY)

    def drawn(seed, x, *, key):
        return jax.random.normal(key), 1.0

    found = cross_fit(jnp.int32(1), jnp.int32(2), points, halves, drawn, key=KEY)
    np.testing.assert_array_equal(found.lid_theta.value, found.lid_star.value)
    assert np.std(found.lid_theta.value) > 0.3


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"halves": Halves(np.arange(5), np.arange(4, 10))}, ValueError, "1 in both"),
        ({"halves": Halves(np.arange(5), np.arange(6, 10))}, ValueError, "1 of 10 points are in"),
        ({"halves": Halves(np.arange(5), np.arange(5, 11))}, ValueError, "row numbers"),
        ({"rows": np.array([0.5])}, ValueError, "row numbers"),
        ({"groups": np.zeros(3, int)}, ValueError, "one number for each"),
        ({"atoms": np.zeros(10)}, ValueError, "true or false"),
        ({"lid": lambda d, x: x[0]}, TypeError, "value and standard error"),
        ({"lid": lambda d, x: (x, x)}, ValueError, "one number"),
        ({"held_out": np.zeros((3, 2))}, ValueError, "must be like those"),
        ({"held_out": np.full((3, 1), np.nan)}, ValueError, "at 0 of 3 points"),
    ],
)
def test_what_is_wrong_is_said(changes, error, match):
    arguments = {
        "points": np.arange(10.0)[:, None],
        "halves": Halves(np.arange(5), np.arange(5, 10)),
        "lid": lambda d, x: (x[0] * d, 1.0),
    }
    with pytest.raises(error, match=match):
        cross_fit(jnp.float32(1), jnp.float32(1), **arguments | changes)


def test_explanations(toy, rows, memorized):
    halves = disjoint_halves(toy, key=KEY)
    memories = [memory_of(toy[np.intersect1d(half, memorized)]) for half in halves]
    rows = rows[[0, 1, 2, 25, -2, -1]]
    found = cross_fit(*memories, toy, halves, toy_curve, rows=rows)
    scores = {"peak": np.arange(6.0), "unknown": np.full(6, np.nan)}
    told = [
        explain(
            toy, row, found.lid_theta, found.lid_star, found.verdict, rows=rows, scores=scores,
            curve_theta=found.curve_theta, curve_star=found.curve_star, num_neighbors=3,
        )
        for row in (rows[2], NUM)
    ]  # fmt: skip
    one, atom = told
    assert one.label is Label.OD_MEM
    assert "Overfitting: the model has 0.0" in one.words
    assert "LID_* is 1.0 at sigma 0.0001" in one.words
    assert one.num_equal == 1
    distances = np.linalg.norm(toy - toy[rows[2]], axis=1)
    assert one.neighbors == tuple(np.argsort(distances, kind="stable")[1:4])
    assert one.scores["peak"].above == pytest.approx(2 / 5)
    assert "unknown: nan, not ranked" in one.words
    assert atom.label is Label.DD_MEM
    assert f"occurs {COPIES} times" in atom.words
    assert NUM + 1 not in atom.neighbors  # what is equal is no neighbour
    assert atom.distances[0] == pytest.approx(1, rel=1e-5)
    for each in told:
        plain = json.loads(json.dumps(each.as_dict(), allow_nan=False))
        assert plain["verdict"] == each.label.title
        assert len(plain["curves"]["lid_theta"]["value"]) == len(SIGMAS)
        assert plain["scores"]["unknown"] == {"value": None, "above": None}


def test_explanations_of_what_is_not_memorized_and_not_known():
    points = np.array([[0.0], [1.0], [1.0]])
    theta = Estimate(np.array([2.0, 1.9, np.nan]), np.full(3, 0.1))
    star = Estimate(np.array([1.0, 2.0, 1.0]), np.full(3, 0.1))
    verdicts = verdict(theta, star)
    words = [explain(points, row, theta, star, verdicts).words for row in range(3)]
    assert "No dimension is lost: the model has 2.0" in words[0]
    assert "errors would not explain" in words[1]
    assert "The dimension of the model is not known" in words[2]
    alone = explain(points[1:], 0, *(Estimate(s.value[1:], s.stderr[1:]) for s in (theta, star)),
                    Verdict(verdicts.label[1:], verdicts.z[1:]))  # fmt: skip
    assert alone.neighbors == ()
    assert "occurs 2 times" in alone.words
    with pytest.raises(ValueError, match="none of the 2 measured"):
        explain(points, 0, theta, star, verdicts, rows=np.array([1, 2]))
    with pytest.raises(ValueError, match="one entry for each"):
        explain(points, 0, theta, star, verdicts, rows=np.array([0, 2]))


def recipe(num_steps):
    return train.Recipe(width=32, depth=1, batch_size=64, num_steps=num_steps, sigma_min=0.01)


def test_twins_are_trained_on_the_halves_and_found_again(tmp_path):
    points = np.random.default_rng(0).normal(size=(41, 2)).astype(np.float32)
    points[1] = points[0]
    calls = []
    twins = train.train_twins(
        points, recipe(20), tmp_path, seed=3, progress=lambda *call: calls.append(call)
    )
    assert {call[0] for call in calls} == {"first", "second"}
    in_first = check_halves(points, twins.halves)
    assert in_first[0] == in_first[1]
    alone = train.train_model(points[twins.halves.second], recipe(20), tmp_path / "alone", seed=3)
    x = jnp.array([0.3, -0.2])
    np.testing.assert_array_equal(alone(x, 0.5), twins.second(x, 0.5))
    assert np.any(np.asarray(twins.first(x, 0.5)) != np.asarray(twins.second(x, 0.5)))
    calls.clear()
    again = train.train_twins(points, recipe(20), tmp_path, seed=3)
    np.testing.assert_array_equal(again.halves.first, twins.halves.first)
    np.testing.assert_array_equal(again.first(x, 0.5), twins.first(x, 0.5))
    assert not calls


@pytest.mark.slow
def test_trained_twins(tmp_path):
    """A plane of two dimensions with a repeated point, and points that the model can memorize."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    points = (rng.normal(size=(1000, 2)) @ frame.T).astype(np.float32)
    held_out = (rng.normal(size=(200, 2)) @ frame.T).astype(np.float32)
    points[900:] = points[900]
    sigmas = jnp.geomspace(0.02, 0.3, 8)
    quick = train.Recipe(width=128, depth=3, num_steps=3000, batch_size=256, sigma_min=0.01)
    twins = train.train_twins(points, quick, tmp_path, seed=0)
    found = cross_fit(
        twins.first, twins.second, points, twins.halves,
        lambda denoiser, x: lid.spectral_curve(denoiser, x, sigmas),
        rows=np.append(np.arange(100), 900), held_out=held_out,
    )  # fmt: skip
    star = found.lid_star.value[:100]
    assert np.isfinite(star).mean() > 0.7
    assert np.nanmedian(star) == pytest.approx(2, abs=0.2)
    labels = np.asarray(found.verdict.label)
    assert share(labels[:100][np.isfinite(star)], Label.NOT_MEMORIZED) > 0.85
    assert labels[100] == Label.DD_MEM
