"""The closed-form diffusion estimator: FLIPD of the exact denoiser, each point left out."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import analytic, lid

SIGMAS = np.geomspace(0.2, 2, 6)


def cloud(num=300, dim=4, seed=0):
    return np.random.default_rng(seed).normal(size=(num, dim))


def residual(data, x, sigma):
    return np.sum(np.asarray(x - data(x, sigma)) ** 2) / sigma**2


@pytest.mark.parametrize("num", [3, 256, 300, 513])
def test_it_is_flipd_of_the_other_points(num, x64):
    points = cloud(num)
    curve = lid.closed_form_curve(points, SIGMAS)
    assert curve.value.shape == curve.stderr.shape == curve.guided.shape == (num, 6)
    for i in {0, 1, num - 1}:
        others = analytic.Empirical(jnp.asarray(np.delete(points, i, axis=0)))
        x = jnp.asarray(points[i])
        np.testing.assert_allclose(curve.value[i], [others.flipd(x, s) for s in SIGMAS], rtol=1e-10)
        np.testing.assert_allclose(
            curve.residual[i], [residual(others, x, s) for s in SIGMAS], rtol=1e-9, atol=1e-12
        )


def test_nothing_is_left_out_for_other_queries(x64):
    points, queries = cloud(), cloud(5, seed=1)
    curve = lid.closed_form_curve(points, SIGMAS, queries=queries)
    data = analytic.Empirical(jnp.asarray(points))
    for x, row in zip(queries, curve.value, strict=True):
        np.testing.assert_allclose(row, [data.flipd(x, s) for s in SIGMAS], rtol=1e-10)
    own = lid.closed_form_curve(points, SIGMAS, queries=points[:3])
    np.testing.assert_allclose(own.value[0], [data.flipd(points[0], s) for s in SIGMAS], rtol=1e-10)


def test_float32_far_from_the_origin():
    points = cloud() + 1e3
    curve = lid.closed_form_curve(points, SIGMAS)
    others = analytic.Empirical(jnp.asarray(np.delete(points, 7, axis=0) - 1e3, jnp.float32))
    x = (points[7] - 1e3).astype(np.float32)
    np.testing.assert_allclose(curve.value[7], [others.flipd(x, s) for s in SIGMAS], rtol=1e-4)
    assert curve.value.dtype == np.float32


def test_the_standard_error_is_that_of_other_data():
    origin = np.zeros((1, 4))
    many = [
        lid.closed_form_curve(cloud(500, seed=seed), SIGMAS[2:], queries=origin)
        for seed in range(400)
    ]
    value, stderr = (np.stack([getattr(c, name)[0] for c in many]) for name in ("value", "stderr"))
    np.testing.assert_allclose(np.median(stderr, axis=0), value.std(axis=0), rtol=0.12)
    # The mean over the data is that of the law, 4 / (1 + sigma^2) at its centre, up to 1 / n.
    np.testing.assert_allclose(value.mean(axis=0), 4 / (1 + SIGMAS[2:] ** 2), rtol=0.01)


def test_the_standard_error_is_its_formula_in_whatever_order(x64):
    points = cloud(600)
    # From far to near: the largest weight so far changes in every block.
    points = points[np.argsort(-np.linalg.norm(points, axis=1))]
    origin = np.zeros((1, 4))
    curve = lid.closed_form_curve(points, SIGMAS, queries=origin)
    terms = np.sum(points**2, axis=1) / SIGMAS[:, None] ** 2
    weights = np.exp(-(terms - terms.min(axis=1, keepdims=True)) / 2)
    weights /= weights.sum(axis=1, keepdims=True)
    value = np.sum(weights * terms, axis=1)
    error = np.sqrt(np.sum(weights**2 * (terms - value[:, None]) ** 2, axis=1))
    np.testing.assert_allclose(curve.value[0], value, rtol=1e-12)
    np.testing.assert_allclose(curve.stderr[0], error, rtol=1e-9)


def test_duplicates_are_atoms_and_far_points_are_seen_to_be_far():
    points = cloud()
    points[1] = points[0]
    points[2] = 1e4
    curve = lid.closed_form_curve(points, np.array([1e-3, 1.0]))
    np.testing.assert_allclose(curve.value[:2, 0], 0, atol=1e-6)
    assert curve.value[2, 1] > 1e7
    assert curve.residual[2, 1] > 1e7
    assert np.isfinite(curve.value).all()
    assert np.isfinite(curve.stderr).all()


def test_a_plane_has_a_plateau_at_its_dimension():
    points = cloud(1500, 2) @ np.eye(2, 10)
    found = lid.at_plateau(lid.closed_form_curve(points, np.geomspace(0.02, 1, 14)))
    assert abs(np.median(found.value) - 2) < 0.1
    turned = points @ np.linalg.qr(cloud(10, 10))[0]
    again = lid.closed_form_curve(3 * turned + 5, 3 * np.geomspace(0.02, 1, 14))
    np.testing.assert_allclose(lid.at_plateau(again).value, found.value, rtol=1e-2)


@pytest.mark.parametrize(
    ("points", "sigmas", "queries", "error", "match"),
    [
        (np.ones((5, 2), int), SIGMAS, None, TypeError, "real data units"),
        (np.ones((2, 2)), SIGMAS, None, ValueError, "at least 3"),
        (np.full((5, 2), np.nan), SIGMAS, None, ValueError, "NaN or infinite values in 5 of 5"),
        (np.ones((5, 2)), SIGMAS[::-1], None, ValueError, "increasing"),
        (np.ones((5, 2)), np.array([0.0, 1.0]), None, ValueError, "positive"),
        (np.ones((5, 2)), 0.5, None, ValueError, r"\(S,\)"),
        (np.ones((5, 2)), SIGMAS, np.ones((5, 3)), ValueError, "must agree"),
    ],
)
def test_errors_name_the_fault(points, sigmas, queries, error, match):
    with pytest.raises(error, match=match):
        lid.closed_form_curve(points, sigmas, queries=queries)
