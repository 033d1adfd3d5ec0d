"""Copies among samples, and the record of a training's moments, on models that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmh_jax import analytic, plotting
from mmh_jax.memorization import copies
from mmh_jax.report.onset import Onset

KEY = jax.random.key(0)


def plane(num, seed):
    """Points of a Gaussian of 3 dimensions in R^8."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, 3)) @ np.eye(3, 8)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 20), st.integers(0, 1000))
def test_copies_are_what_their_definition_says(num_points, num_samples, seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(num_points, 2)).astype(np.float32)
    near = points[rng.integers(0, num_points, num_samples)]
    samples = (near + 0.1 * rng.normal(size=near.shape)).astype(np.float32)
    found = copies(samples, np.concatenate([points, points[:1], points[:1]]))
    distances = np.linalg.norm(samples[:, None] - points, axis=2)
    d_1, d_2 = np.sort(distances, axis=1)[:, :2].T
    np.testing.assert_allclose(found.ratio, d_1 / d_2, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.nearest, distances.argmin(axis=1))
    clear = abs(d_1 / d_2 - 1 / 3) > 1e-4
    np.testing.assert_array_equal(found.memorized[clear], (d_1 / d_2 < 1 / 3)[clear])
    assert found.counts.sum() == found.memorized.sum()
    assert found.fraction.value == pytest.approx(found.memorized.mean())


def test_near_duplicates_count_as_one_point():
    points = np.array([[0.0], [0.01], [5.0]], np.float32)
    sample = np.array([[0.2]], np.float32)
    assert not copies(sample, points).memorized[0]
    assert copies(sample, points, tolerance=0.02).memorized[0]
    # The copy of a point in the middle of a chain is one, and its row is named.
    chain = np.append(np.arange(0, 5.05, 0.1), 8.0).astype(np.float32)[:, None]
    found = copies(np.array([[5.0]], np.float32), chain, tolerance=0.11)
    assert found.memorized[0]
    assert found.nearest[0] == 50
    with pytest.raises(ValueError, match="are one to the tolerance"):
        copies(sample, points[:2], tolerance=0.02)
    with pytest.raises(ValueError, match="between 0 and 1"):
        copies(sample, points, threshold=1.5)


def test_the_error_of_a_share():
    points = np.arange(0.0, 40.0, 4.0)[:, None]
    none = copies(points + 2, points).fraction
    assert none.value == 0
    assert 0 < none.stderr < 0.2
    assert copies(points + 0.1, points).fraction.value == 1


@pytest.fixture(scope="module")
def moments():
    """Of a model that knows the law, and of one that knows its training points alone."""
    points, held_out = plane(20, 0), plane(12, 1)
    measure = Onset(
        points, points[:12], held_out, sigma=0.05, sigmas=np.array([0.05, 0.2]), num_samples=60,
        sigma_range=(0.02, 20.0), key=KEY,
    )  # fmt: skip
    mean, basis, scales = np.zeros(8), np.eye(8, 3), np.ones(3)
    law = analytic.LinearGaussian(*(jnp.asarray(a, float) for a in (mean, basis, scales)))
    return [measure(law, 100), measure(analytic.Empirical(points), 200)]


def test_a_model_of_the_law_and_one_of_the_points(moments):
    law, memory = moments
    assert law.memorized.value < 0.3
    assert memory.memorized.value > 0.95
    assert law.lid_train.value == pytest.approx(3, abs=0.1)
    assert law.lid_held_out.value == pytest.approx(3, abs=0.1)
    assert memory.lid_train.value == pytest.approx(0, abs=0.05)
    assert np.all(abs(law.gap.value) < 4 * law.gap.stderr)
    assert np.all(memory.gap.value > np.maximum(2 * memory.gap.stderr, 10))


def test_rows_and_their_figure(moments, tmp_path):
    rows = [
        {"n": num, "seed": seed} | moment.row()
        for num in (20, 40) for seed in (0, 1) for moment in moments
    ]  # fmt: skip
    assert rows[0]["step"] == 100
    assert len(rows[0]["gap"]) == 2
    figure = plotting.onset_figure(rows, level=1, title="onset")
    assert len(figure.axes) == 3
    # A thin line for each seed and a thick one, for each n; and what the legends show.
    assert len(figure.axes[0].lines) == 2 * 3 + 2
    figure.savefig(tmp_path / "onset.png")
    assert (tmp_path / "onset.png").stat().st_size > 10_000
