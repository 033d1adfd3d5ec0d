"""The registry of named sets and the benchmark manifolds M1 to Mp3, against scikit-dimension."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mmh_jax import analytic
from mmh_jax.data import curved, embedded, manifolds, registry, warped
from mmh_jax.data.benchmark import MANIFOLDS

NUM = 4000
KEY = jax.random.key(registry.TEST_SEED)
SETS = registry.sets()
# Compiling what draws their frames takes seconds for each.
SLOW = {
    name
    for name, known in SETS.items()
    if known.family in ("affine", "warped") and known.ambient_dim >= 100
}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SETS]


@functools.cache
def sample(name: str, num: int, seed: int = registry.TEST_SEED) -> manifolds.Labelled:
    return jax.tree.map(np.asarray, SETS[name].sample(num, key=jax.random.key(seed)))


def ranks(chart, latents) -> set[int]:
    """The numerical ranks of the differential of `chart` at each of the points of `latents`."""
    differentials = np.asarray(jax.jit(jax.vmap(jax.jacfwd(chart)))(latents))
    assert differentials.dtype == np.float64
    values = np.linalg.svd(differentials, compute_uv=False)
    return set((values > 1e-10 * values[:, :1]).sum(1).tolist())


def distances(points) -> np.ndarray:
    """Between disjoint pairs, so that they are independent."""
    points = np.asarray(points, float)
    return np.linalg.norm(points[::2] - points[1::2], axis=1)


def least_pvalue(ours, theirs) -> float:
    """Of Kolmogorov-Smirnov tests of coordinates, their sums by two, and distances of pairs."""

    def features(points):
        points = np.asarray(points, float)
        sums = points[:, 1:] + points[:, :-1]
        found = np.column_stack([points, sums, distances(points).repeat(2)])
        return np.round(found, 4).T  # an atom is an atom, whatever the rounding

    *columns, last = zip(features(ours), features(theirs), strict=True)
    columns.append(tuple(values[::2] for values in last))
    return min(stats.ks_2samp(a, b).pvalue for a, b in columns)


def is_uniform(values, low, high) -> bool:
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


# Every set


def test_the_names():
    assert len(SETS) == 80
    assert all(name == known.name for name, known in SETS.items())
    assert {name for name, known in SETS.items() if known.family == "benchmark"} == set(MANIFOLDS)
    families = {known.family for known in SETS.values()}
    assert families == {"affine", "curved", "warped", "sphere", "embedded", "toy", "benchmark"}


@pytest.mark.spread(4)
@pytest.mark.parametrize("name", NAMES)
def test_a_set_has_the_shape_and_the_dimensions_it_declares(name):
    known = SETS[name]
    points, lid, component = sample(name, 100)
    assert points.shape == (100, known.ambient_dim)
    assert lid.shape == component.shape == (100,)
    assert np.isfinite(points).all()
    assert tuple(sorted(set(lid.tolist()))) == known.dims
    assert len({(int(k), int(d)) for k, d in zip(component, lid, strict=True)}) == len(known.dims)


@pytest.mark.spread(4)
@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_a_function_of_its_key(name):
    again = SETS[name].sample(100, key=KEY)
    np.testing.assert_array_equal(again.points, sample(name, 100).points)
    other = sample(name, 100, registry.TRAIN_SEED)
    assert not np.allclose(other.points, sample(name, 100).points)


@pytest.mark.parametrize("name", ["lollipop", "Gaussian 5 in 10", "von Mises toy", "Mbeta"])
def test_impossible_numbers_are_refused(name):
    with pytest.raises(ValueError, match="num=0"):
        SETS[name].sample(0, key=KEY)
    with pytest.raises(TypeError, match="key"):
        SETS[name].sample(3, key=None)


def test_half_of_the_toy_is_on_the_circle():
    points, lid, _ = sample("von Mises toy", 101)
    np.testing.assert_array_equal(lid, [1] * 51 + [0] * 50)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), lid, atol=1e-6)


# Samples are those on which published numbers rest


def test_samples_are_those_of_the_sets_they_name():
    frame_key, num = jax.random.key(0), 50
    mixture = manifolds.affine_mixture((2, 4, 8), 10, key=frame_key, latent=manifolds.laplace)
    hyperball_frame = jax.random.orthogonal(frame_key, 64, m=16)
    former = {
        "Laplace 2+4+8 in 10": mixture.standardized().sample(num, key=KEY),
        "string in doughnut": curved.rescale(
            curved.string_in_doughnut(num, key=KEY), shift=0.0, scale=5.0
        ),
        "sphere 10 in 11": analytic.Sphere(10, 1.0).sample(num, key=KEY),
        "hyperball 16 in 64": embedded.hyperball(num, key=KEY, frame=hyperball_frame),
        "spline flow 2+4+8 in 10": warped.spline_flow((2, 4, 8), 10, key=frame_key).sample(
            num, key=KEY
        ),
    }
    for name, expected in former.items():
        points = getattr(expected, "points", expected)
        np.testing.assert_array_equal(sample(name, num).points, points)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("lollipop", [[2.2383096, 2.3553987], [3.6577804, 3.2757483]]),
        ("M3 concentrated", [[-0.5138918, -0.0409394], [-0.0356496, 0.2643961]]),
        ("Mp1 paraboloid", [[0.3072345, 0.7966100], [0.7055618, 0.2906090]]),
    ],
)
def test_samples_do_not_change(name, start):
    """To rounding, which another processor does otherwise."""
    np.testing.assert_allclose(sample(name, 64).points[:2, :2], start, atol=2e-5)


def test_a_frame_is_made_once_and_not_traced():
    known = registry._affine("Gaussian", (1, 2), 4)
    compiled = jax.jit(known.sample, static_argnums=0)(9, key=KEY)
    np.testing.assert_allclose(known.sample(9, key=KEY).points, compiled.points, atol=1e-5)
    assert known.mixture() is known.mixture()


def test_a_frame_has_the_precision_of_its_use():
    known = registry._affine("Gaussian", (1, 2), 4)
    for x64, dtype in ((False, np.float32), (True, np.float64), (False, np.float32)):
        with jax.enable_x64(x64):
            assert known.sample(9, key=KEY).points.dtype == dtype
            assert known.mixture().modes.dtype == dtype


# Exact denoisers


EXACT = {"Gaussian 5 in 10", "Gaussian 2+4+8 in 10", "sphere 10 in 11"}
EXACT |= {"M1 sphere", "M12 Gaussian", "von Mises toy"}


def test_which_sets_have_an_exact_denoiser():
    found = {name for name, known in SETS.items() if known.ambient_dim < 100}
    assert {name for name in found if analytic.denoiser_of(SETS[name]) is not None} == EXACT


@pytest.mark.parametrize("name", sorted(EXACT))
def test_an_exact_denoiser_is_of_the_law_that_is_sampled(name):
    exact = analytic.denoiser_of(SETS[name])
    points, lid, _ = sample(name, NUM)
    assert exact.shape == (SETS[name].ambient_dim,)
    assert np.asarray(jax.vmap(exact.distance)(points)).max() < 1e-4
    found = jax.vmap(functools.partial(exact.lid, tolerance=1e-4))(points)
    np.testing.assert_array_equal(found, lid)
    mixed = np.random.default_rng(0).permutation(points)  # those of the toy come in order
    assert least_pvalue(mixed, exact.sample(NUM, key=jax.random.key(7))) > 1e-4


# The benchmark manifolds


@pytest.mark.spread(4)
@pytest.mark.parametrize("name", MANIFOLDS)
def test_the_rank_of_the_chart_is_the_dimension(x64, name):
    known = MANIFOLDS[name]
    latents = known.draw(KEY, 100)
    assert ranks(known.chart, latents) == {known.dim}
    assert known.chart(latents).shape == (100, known.ambient_dim)


def test_mixtures_have_the_rank_they_declare():
    for name in ("Gaussian 2+4+8 in 10", "uniform 10+25+50 in 100"):
        mixture = SETS[name].mixture()
        assert tuple(np.linalg.matrix_rank(matrix) for matrix in mixture.maps) == SETS[name].dims


@pytest.fixture(scope="module")
def theirs():
    skdim = pytest.importorskip("skdim", reason="published for Python below 3.13 only")
    table = types.SimpleNamespace(T=None)
    with pytest.MonkeyPatch.context() as patch:
        # Only the table of its truth is a data frame.
        frames = types.SimpleNamespace(DataFrame=lambda *_, **__: table)
        patch.setitem(sys.modules, "pandas", frames)
        sets = skdim.datasets.BenchmarkManifolds(random_state=0)
    names = {name.split("_")[0]: name for name in sets._dict_truth}

    def draw(name):
        their_name = names[name.split()[0]]
        dim, ambient_dim, _ = sets._dict_truth[their_name]
        sets.random_state = np.random.RandomState(0)  # whichever were drawn before
        points = sets.generate(name=their_name, n=NUM, dim=ambient_dim, d=dim)
        # Those of the cube come face by face.
        return np.random.default_rng(0).permutation(points), dim, ambient_dim

    return draw


OTHERS = {"M2", "M5b", "M7", "M10a", "M10b", "M10c", "M10d", "M13b"}


@pytest.mark.spread(4)
@pytest.mark.parametrize("name", MANIFOLDS)
def test_the_law_is_that_of_scikit_dimension_unless_the_module_says_otherwise(theirs, name):
    points, dim, ambient_dim = theirs(name)
    assert (MANIFOLDS[name].dim, MANIFOLDS[name].ambient_dim) == (dim, ambient_dim)
    pvalue = least_pvalue(columns(name).T, points)
    if name.split()[0] in OTHERS:
        assert pvalue < 1e-9
    else:
        assert pvalue > 1e-4


# Those that scikit-dimension has otherwise, against the generator of Hein and Audibert


def columns(name):
    return sample(name, NUM, registry.TRAIN_SEED).points.astype(float).T


def test_m2_is_the_published_affine_space():
    points = columns("M2 affine").T
    matrix = np.array(
        [[1.2, -0.5, 0], [0.5, 0, 0.9], [-0.5, -0.2, 1], [0.4, -0.9, -0.1], [1.1, 0, -0.3]]
    )
    offset = np.array([3, -1, 0, 0, 8])
    parameters = np.linalg.lstsq(matrix, (points - offset).T)[0]
    np.testing.assert_allclose(matrix @ parameters, (points - offset).T, atol=1e-5)
    assert all(is_uniform(p, 0, 4) for p in parameters)


def test_m5b_is_the_published_helicoid():
    x, y, t = columns("M5b helicoid")
    np.testing.assert_allclose(x * np.cos(t), y * np.sin(t), atol=1e-5)
    assert is_uniform(t, 0, 2 * np.pi)
    assert is_uniform(x * np.sin(t) + y * np.cos(t), -np.pi, np.pi)


def test_m7_is_the_published_roll():
    x, height, y = columns("M7 roll")
    t = np.hypot(x, y)
    np.testing.assert_allclose(x, t * np.sin(2.5 * t), atol=2e-4)
    np.testing.assert_allclose(y, t * np.cos(2.5 * t), atol=2e-4)
    assert is_uniform(t, 0, 2 * np.pi)
    assert is_uniform(height, -np.pi, np.pi)


@pytest.mark.parametrize("name", ["M10a cube", "M10d cube"])
def test_m10_is_a_solid_cube(name):
    *inside, last = columns(name)
    np.testing.assert_array_equal(last, 0)
    assert all(is_uniform(p, 0, 1) for p in inside[:10])
    assert is_uniform(np.max(inside, axis=0) ** len(inside), 0, 1)


def test_m13b_is_the_published_curve():
    points = columns("M13b curve")
    t = 2 * np.pi * points[0]
    assert is_uniform(t, 0, 2 * np.pi)
    for j in range(13):
        expected = (t / (2 * np.pi) + sum(np.sin(k * t) for k in range(1, j + 1))) / (j + 1)
        np.testing.assert_allclose(points[j], expected, atol=2e-5)


def test_m10_and_m9_reach_into_every_corner():
    """Volume near the boundary is that of a cube: no coordinate is left out or repeated."""
    for name, side in (("M9 affine", 5.0), ("M10c cube", 1.0)):
        dim = SETS[name].dims[0]
        points = columns(name)[:dim]
        correlation = np.corrcoef(points) - np.eye(dim)
        assert np.abs(correlation).max() < 5 / NUM**0.5
        np.testing.assert_allclose(np.var(points, axis=1), side**2 / 12, rtol=0.1)


def test_charts_keep_leading_axes():
    for known in MANIFOLDS.values():
        latents = jax.eval_shape(lambda draw=known.draw: jnp.reshape(draw(KEY, 6), (2, 3, -1)))
        assert jax.eval_shape(known.chart, latents).shape == (2, 3, known.ambient_dim)
