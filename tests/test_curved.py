"""The curved sets: `curved`, `embedded`, `warped` and `diffeomorphisms`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mmh_jax.data import curved, embedded, warped
from mmh_jax.data.diffeomorphisms import sine_map, spline_map
from mmh_jax.data.manifolds import Labelled, laplace

NUM = 20_000
KEY = jax.random.key(0)

SHAPES = {
    "string_in_doughnut": curved.string_in_doughnut,
    "torus_and_circle": curved.torus_and_circle,
    "lollipop": curved.lollipop,
    "swiss_roll": curved.swiss_roll,
}
EMBEDDED = {  # the natural number of coordinates, for dim = 5
    "hypersphere": (embedded.hypersphere, 6),
    "hyperball": (embedded.hyperball, 5),
    "twin_peaks": (embedded.twin_peaks, 6),
    "clifford_torus": (embedded.clifford_torus, 10),
    "nonlinear": (embedded.nonlinear, 20),
}
SETS = SHAPES | {
    name: functools.partial(make, dim=5, ambient_dim=23) for name, (make, _) in EMBEDDED.items()
}


@functools.cache
def compiled(name: str):
    return jax.jit(SETS[name], static_argnums=0)


@functools.cache
def sample(name: str) -> Labelled:
    return jax.tree.map(np.asarray, compiled(name)(NUM, key=KEY))


def ranks(chart, latents) -> set[int]:
    """The numerical ranks of the differential of `chart` at each of the points of `latents`."""
    differentials = np.asarray(jax.jit(jax.vmap(jax.jacfwd(chart)))(latents))
    assert differentials.dtype == np.float64
    values = np.linalg.svd(differentials, compute_uv=False)
    return set((values > 1e-10 * values[:, :1]).sum(1).tolist())


def is_uniform(values, low=0.0, high=1.0) -> bool:
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


# Every set


@pytest.mark.parametrize("name", SETS)
def test_shapes_and_labels(name):
    points, lid, component = sample(name)
    assert points.shape[0] == lid.shape[0] == component.shape[0] == NUM
    assert np.isfinite(points).all()
    of_component = {(int(k), int(d)) for k, d in zip(component, lid, strict=True)}
    assert of_component == {
        "string_in_doughnut": {(0, 1), (1, 2)},
        "torus_and_circle": {(0, 1), (1, 2)},
        "lollipop": {(0, 2), (1, 1), (2, 0)},
        "swiss_roll": {(0, 2)},
    }.get(name, {(0, 5)})


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", SETS)
def test_a_set_is_a_function_of_its_key(name):
    draw = compiled(name)
    again, other = draw(NUM, key=KEY), draw(NUM, key=jax.random.key(1))
    np.testing.assert_array_equal(again.points, sample(name).points)
    assert not np.allclose(other.points, sample(name).points)


@pytest.mark.parametrize("name", ["lollipop", "hypersphere"])
def test_compiled_or_not_a_set_is_the_same(name):
    eager = SETS[name](NUM, key=KEY)
    np.testing.assert_allclose(eager.points, sample(name).points, atol=2e-5)
    np.testing.assert_array_equal(eager.component, sample(name).component)


@pytest.mark.parametrize("name", SETS)
def test_impossible_numbers_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}\(num=0\)"):
        SETS[name](0, key=KEY)
    with pytest.raises(TypeError, match=name):
        SETS[name](3, key=None)


# Shapes


def test_the_string_runs_at_the_core_of_the_doughnut():
    points, _, component = sample("string_in_doughnut")
    x, y, z = points.astype(float).T
    from_core = np.hypot(np.hypot(x, y) - 10, z)
    np.testing.assert_allclose(from_core[component == 0], 0, atol=1e-5)
    np.testing.assert_allclose(from_core[component == 1], 1, atol=1e-5)
    assert abs(component.mean() - 0.5) < 4 * 0.5 / NUM**0.5
    along, around = np.arctan2(y, x), np.arctan2(z, np.hypot(x, y) - 10)
    for k in (0, 1):
        assert is_uniform(along[component == k], -np.pi, np.pi)
    assert is_uniform(around[component == 1], -np.pi, np.pi)


def test_the_circle_is_linked_with_the_torus():
    points, _, component = sample("torus_and_circle")
    circle, torus = (points[component == k].astype(float) for k in (0, 1))
    np.testing.assert_array_equal(circle[:, 1], 0)
    np.testing.assert_allclose(np.hypot(circle[:, 0] - 2, circle[:, 2]), 2, atol=1e-5)
    distance = np.hypot(np.hypot(torus[:, 0], torus[:, 1]) - 2, torus[:, 2])
    np.testing.assert_allclose(distance, 0.5, atol=1e-5)
    gap = np.hypot(np.hypot(circle[:, 0], circle[:, 1]) - 2, circle[:, 2]) - 0.5
    assert 1.5 - 1e-5 < gap.min() < 1.51
    # The core of the torus bounds a disc of radius 2; the circle crosses it once, at the centre.
    ordered = circle[np.argsort(np.arctan2(circle[:, 2], circle[:, 0] - 2))]
    crosses = np.flatnonzero(ordered[:, 2] * np.roll(ordered[:, 2], -1) < 0)
    assert sorted(np.hypot(*ordered[crosses, :2].T) < 2) == [False, True]
    assert abs(component.mean() - 0.5) < 4 * 0.5 / NUM**0.5


def test_the_lollipop():
    points, _, component = sample("lollipop")
    disc, stick, dot = (points[component == k].astype(float) for k in range(3))
    shares = np.bincount(component) / NUM
    np.testing.assert_allclose(shares, np.array([4, 2, 1]) / 7, atol=4 * 0.5 / NUM**0.5)
    np.testing.assert_array_equal(dot, 0)
    assert is_uniform(((disc - 3) ** 2).sum(1))
    assert is_uniform(np.arctan2(*(disc - 3).T), -np.pi, np.pi)
    np.testing.assert_array_equal(stick[:, 0], stick[:, 1])
    assert is_uniform(stick[:, 0], 1.5, 3 - 0.5**0.5)


def test_the_lollipop_without_its_dot():
    component = curved.lollipop(500, key=KEY, weights=(2, 1, 0)).component
    assert set(np.asarray(component).tolist()) == {0, 1}


def test_the_swiss_roll():
    x, height, y = sample("swiss_roll").points.astype(float).T
    t = np.hypot(x, y)
    assert is_uniform(t, 1.5 * np.pi, 4.5 * np.pi)
    assert is_uniform(height, 0, 21)
    np.testing.assert_allclose(np.exp(1j * t), (x + 1j * y) / t, atol=1e-5)


def test_shapes_have_their_rank(x64):
    angles = jax.random.uniform(KEY, (100, 2), maxval=2 * np.pi)
    assert ranks(lambda a: curved._torus(a, 10.0, 1.0), angles) == {2}
    assert ranks(lambda a: curved._torus(a, 10.0, 0.0), angles) == {1}
    assert ranks(curved._swiss_roll, jax.random.uniform(KEY, (100, 2))) == {2}


@pytest.mark.parametrize("name", ["string_in_doughnut", "torus_and_circle"])
@pytest.mark.parametrize(("major", "minor"), [(1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_a_tube_that_meets_itself_is_refused(name, major, minor):
    with pytest.raises(ValueError, match=f"{name}.*minor"):
        SETS[name](3, key=KEY, major=major, minor=minor)


@pytest.mark.parametrize("weights", [(1, 1), (0, 0, 0), (-1, 1, 1), (float("nan"), 1, 1)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        curved.lollipop(3, key=KEY, weights=weights)


def test_rescale_is_isotropic():
    roll = sample("swiss_roll")
    units = {"shift": roll.points.mean(0), "scale": roll.points.std(0).max()}
    points, lid, component = curved.rescale(roll, **units)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-4)
    assert points.std(0).max() == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(lid, roll.lid)
    np.testing.assert_array_equal(component, roll.component)
    ratio = np.linalg.norm(points[1:] - points[0], axis=1) / np.linalg.norm(
        roll.points[1:] - roll.points[0], axis=1
    )
    np.testing.assert_allclose(ratio, 1 / units["scale"], rtol=1e-3)
    inside = jax.jit(curved.rescale)(roll, **units).points
    np.testing.assert_allclose(inside, points, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), np.ones(3)])
def test_rescale_refuses(scale):
    with pytest.raises(ValueError, match="scale"):
        curved.rescale(sample("swiss_roll"), shift=0.0, scale=scale)


# Manifolds of any dimension


def natural(name: str, num: int, dim: int, key=KEY) -> np.ndarray:
    """Points in the coordinates of the chart, before any frame."""
    make, size = EMBEDDED[name]
    width = {"hypersphere": dim + 1, "hyperball": dim, "twin_peaks": dim + 1}
    width |= {"clifford_torus": 2 * dim, "nonlinear": 4 * dim}
    assert dim != 5 or width[name] == size
    return np.asarray(make(num, dim, width[name], key=key).points, np.float64)


def test_the_sphere_is_uniform():
    """Of S^5: length 1, mean 0, second moments 1 / 6, x_i^2 ~ Beta(1/2, 5/2)."""
    points = natural("hypersphere", NUM, 5)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(points.mean(0), 0, atol=5 * (1 / 6 / NUM) ** 0.5)
    np.testing.assert_allclose(points.T @ points / NUM, np.eye(6) / 6, atol=0.01)
    for coordinate in points.T:
        assert stats.kstest(coordinate**2, stats.beta(0.5, 2.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dim", [1, 5])
def test_the_ball_is_uniform(dim):
    points = natural("hyperball", NUM, dim)
    radius = np.linalg.norm(points, axis=1)
    assert is_uniform(radius**dim)
    variance = 1 / (dim + 2)
    np.testing.assert_allclose(points.T @ points / NUM, variance * np.eye(dim), atol=0.01)
    np.testing.assert_allclose(points.mean(0), 0, atol=5 * (variance / NUM) ** 0.5)


def test_the_peaks_are_a_graph():
    points = natural("twin_peaks", NUM, 2)
    for coordinate in points[:, :2].T:
        assert is_uniform(coordinate)
    height = np.sin(2 * np.pi * points[:, 0]) * np.sin(2 * np.pi * points[:, 1])
    np.testing.assert_allclose(points[:, 2], height, atol=1e-5)
    tall = embedded.twin_peaks(NUM, 2, 3, key=KEY, height=3.0).points
    np.testing.assert_allclose(tall[:, 2], 3 * points[:, 2], atol=1e-5)


def test_the_clifford_torus_is_a_product_of_circles():
    points = natural("clifford_torus", NUM, 5).reshape(NUM, 5, 2)
    np.testing.assert_allclose(np.linalg.norm(points, axis=2), 1, rtol=1e-6)
    angles = np.arctan2(points[..., 1], points[..., 0])
    assert all(is_uniform(angle, -np.pi, np.pi) for angle in angles.T)
    assert np.abs(np.corrcoef(points.reshape(NUM, 10).T) - np.eye(10)).max() < 0.03


def test_the_nonlinear_manifold_is_that_of_scikit_dimension():
    u = np.random.default_rng(0).random((NUM, 4))
    p = [np.tan(u[:, i] * np.cos(u[:, 3 - i])) for i in range(4)]
    q = [np.arctan(u[:, 3 - i] * np.sin(u[:, i])) for i in range(4)]
    expected = np.stack([*p, *q, *p, *q], axis=1)
    np.testing.assert_allclose(embedded._nonlinear(jnp.asarray(u)), expected, atol=1e-6)
    points = natural("nonlinear", NUM, 4)
    for found, law in zip(points.T, expected.T, strict=True):
        assert stats.ks_2samp(found, law).pvalue > 1e-3


@pytest.mark.parametrize("dim", [1, 5])
def test_manifolds_have_their_rank(x64, dim):
    u = jax.random.uniform(KEY, (100, dim))
    assert ranks(embedded._sphere, jax.random.normal(KEY, (100, dim + 1))) == {dim}
    assert ranks(lambda u: embedded._twin_peaks(u, 1.0), u) == {dim}
    assert ranks(embedded._clifford_torus, 2 * np.pi * u) == {dim}
    assert ranks(embedded._nonlinear, u) == {dim}


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_frame_keeps_distances_and_mixes_coordinates(name):
    make, size = EMBEDDED[name]
    flat = make(200, 5, size, key=KEY).points
    lifted = make(200, 5, size + 7, key=KEY).points
    np.testing.assert_allclose(lifted @ lifted.T, flat @ flat.T, atol=1e-4)
    assert np.linalg.matrix_rank(lifted, tol=1e-3) <= size
    assert np.asarray(lifted).std(0).min() > 0.01
    padded = make(200, 5, size + 7, key=KEY, frame=jnp.eye(size + 7, size)).points
    np.testing.assert_allclose(padded[:, :size], flat, atol=1e-6)
    np.testing.assert_array_equal(padded[:, size:], 0)


@pytest.mark.parametrize("name", EMBEDDED)
def test_too_few_coordinates_are_refused(name):
    make, size = EMBEDDED[name]
    with pytest.raises(ValueError, match=f"{name}.*needs {size} coordinates"):
        make(3, 5, size - 1, key=KEY)
    with pytest.raises(ValueError, match=f"{name}.*frame.*{size}"):
        make(3, 5, size + 1, key=KEY, frame=jnp.eye(size))
    with pytest.raises(ValueError, match=f"{name}.*dim"):
        make(3, 0, size, key=KEY)
    with pytest.raises(ValueError, match=f"{name}.*ambient_dim"):
        make(3, 5, 30.5, key=KEY)


@pytest.mark.parametrize(
    ("name", "dim", "ambient_dim"),
    [
        ("hypersphere", 16, 64),
        ("hyperball", 16, 64),
        ("twin_peaks", 128, 256),
        ("clifford_torus", 32, 128),
        ("nonlinear", 32, 128),
    ],
)
def test_the_defaults_are_the_published_sizes(name, dim, ambient_dim):
    points, lid, _ = jax.jit(EMBEDDED[name][0], static_argnums=0)(20, key=KEY)
    assert points.shape == (20, ambient_dim)
    assert set(lid.tolist()) == {dim}


# Diffeomorphisms and the mixtures that they warp


KINDS = {"squiggly": warped.squiggly, "spline_flow": warped.spline_flow}
DIMS = (0, 2)


@functools.cache
def mixture(kind: str) -> warped.WarpedMixture:
    make = jax.jit(KINDS[kind], static_argnums=(0, 1), static_argnames=("latent",))
    return make(DIMS, 5, key=KEY)


draw = jax.jit(lambda mixture, key: mixture.sample(NUM, key=key))


make_spline = jax.jit(spline_map, static_argnums=0, static_argnames=("num_layers", "num_bins"))
apply = jax.jit(lambda warp, x: warp(x))
invert = jax.jit(lambda warp, y: warp.inverse(y))


def spline(ambient_dim: int, num_layers: int = 5, roughness: float = 0.5):
    return make_spline(
        ambient_dim, key=KEY, num_layers=num_layers, num_bins=8, bound=3.0, roughness=roughness
    )


def test_splines_pass_through_their_knots_with_their_slopes(x64):
    warp = spline(4, num_layers=1)
    warp = warp.replace(rotations=jnp.eye(4)[None])
    knots, values, slopes = warp.knots[0], warp.values[0], warp.slopes[0]
    assert (np.diff(knots) > 0).all()
    assert (np.diff(values) > 0).all()
    for end, bound in ((0, -3.0), (-1, 3.0)):
        np.testing.assert_array_equal(knots[:, end], bound)
        np.testing.assert_array_equal(values[:, end], bound)
        np.testing.assert_array_equal(slopes[:, end], 1)
    np.testing.assert_allclose(apply(warp, knots.T), values.T, atol=1e-12)
    for side in (-1e-9, 1e-9):  # the derivative from either side
        differentials = jax.jit(jax.vmap(jax.jacfwd(warp)))(knots.T + side)
        found = jnp.diagonal(differentials, axis1=1, axis2=2)
        np.testing.assert_allclose(found, slopes.T, rtol=1e-6)


def test_splines_increase_and_are_the_identity_outside():
    warp = spline(3, num_layers=1).replace(rotations=jnp.eye(3)[None])
    line = jnp.linspace(-4, 4, 4001)[:, None] * jnp.ones(3)
    image = np.asarray(apply(warp, line))
    assert (np.diff(image, axis=0) > 0).all()
    outside = np.abs(np.asarray(line)[:, 0]) >= 3
    np.testing.assert_array_equal(image[outside], line[outside])


def test_spline_maps_are_inverted(x64):
    warp = spline(5)
    x = 2 * jax.random.normal(KEY, (500, 5))
    np.testing.assert_allclose(invert(warp, apply(warp, x)), x, atol=1e-10)
    np.testing.assert_allclose(apply(warp, invert(warp, x)), x, atol=1e-10)


def test_spline_maps_are_inverted_in_single_precision():
    warp = spline(5, roughness=0.25)
    x = 2 * jax.random.normal(KEY, (500, 5))
    np.testing.assert_allclose(invert(warp, apply(warp, x)), x, atol=1e-4)


def test_a_spline_map_without_roughness_is_a_rotation():
    warp = spline(5, roughness=0.0)
    x = jax.random.normal(KEY, (500, 5))
    rotation = functools.reduce(np.matmul, np.asarray(warp.rotations)[::-1])
    np.testing.assert_allclose(apply(warp, x), x @ rotation.T, atol=1e-5)


def test_sine_maps_have_the_slopes_they_claim(x64):
    warp = sine_map(4, key=KEY, num_layers=1, frequency=10.0, kappa=0.1)
    assert 0 < warp.waved.sum() < 4
    x = jax.random.uniform(KEY, (1000, 4))
    values = np.linalg.svd(jax.jit(jax.vmap(jax.jacfwd(warp)))(x), compute_uv=False)
    assert 0.1 <= values.min() < 0.11
    assert 1.89 < values.max() <= 1.9
    plain = warp.replace(rotations=jnp.eye(4)[None])
    waved = np.asarray(warp.waved[0])
    np.testing.assert_array_equal(plain(x)[:, ~waved], x[:, ~waved])
    expected = x + 0.9 * np.sin(10 * x) / 10
    np.testing.assert_allclose(plain(x)[:, waved], expected[:, waved], atol=1e-12)


@pytest.mark.parametrize(
    "make", [functools.partial(warped.squiggly, kappa=0.1), warped.spline_flow], ids=KINDS
)
def test_the_differential_of_each_piece_has_its_rank(x64, make):
    mixture = jax.jit(make, static_argnums=(0, 1))((3,), 5, key=KEY)
    z = mixture.latent.draw(KEY, (500, 3))
    assert ranks(functools.partial(mixture.piece, 0), z) == {3}
    assert ranks(mixture.warps[0], z @ mixture.frames[0].T) == {5}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_labelled_separate_and_equally_likely(kind):
    points, lid, component = map(np.asarray, draw(mixture(kind), jax.random.key(1)))
    np.testing.assert_array_equal(lid, np.array(DIMS)[component])
    assert abs(component.mean() - 0.5) < 4 * 0.5 / NUM**0.5
    modes = np.asarray(mixture(kind).modes)
    nearest = np.linalg.norm(points[:, None] - modes, axis=-1).argmin(1)
    np.testing.assert_array_equal(nearest, component)
    for k in range(2):
        piece = points[component == k]
        np.testing.assert_allclose(piece.mean(0), modes[k], atol=0.15)
        assert piece.std(0).max() < 1.1
    np.testing.assert_allclose(points[component == 0], modes[[0]].repeat(sum(component == 0), 0))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_curved(kind):
    """A flat piece of dimension 2 lies in a plane; a warped one does not."""
    points, lid, _ = map(np.asarray, draw(mixture(kind), jax.random.key(1)))
    piece = points[lid == 2]
    deviations = np.linalg.svd(piece - piece.mean(0), compute_uv=False) / len(piece) ** 0.5
    assert deviations[2] > 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_test_are_of_one_mixture(kind):
    one, other = (draw(mixture(kind), jax.random.key(seed)) for seed in (1, 2))
    np.testing.assert_array_equal(one.points, draw(mixture(kind), jax.random.key(1)).points)
    assert not np.allclose(one.points, other.points)
    distances = np.linalg.norm(
        np.asarray(one.points)[one.lid == 2][:200, None] - np.asarray(other.points)[other.lid == 2],
        axis=-1,
    )
    assert np.median(distances.min(1)) < 0.05


def test_wide_pieces_are_brought_to_standard_deviation_one():
    wide = warped.squiggly((3,), 4, key=KEY, latent=laplace, frequency=1.0)
    assert (np.asarray(wide.scales) >= 1).all()
    assert np.asarray(wide.scales).max() > 1.1
    deviations = np.asarray(draw(wide, KEY).points).std(0)
    np.testing.assert_allclose(deviations[np.asarray(wide.scales[0]) > 1], 1, rtol=0.15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dims", "ambient_dim", "options"),
    [
        ((), 3, {}),
        ((4,), 3, {}),
        ((1,), 0, {}),
        ((1,), 3, {"num_layers": 0}),
        ((1,), 3, {"num_calibration": 0}),
    ],
)
def test_impossible_mixtures_are_refused(kind, dims, ambient_dim, options):
    with pytest.raises(ValueError, match=rf"{kind}\("):
        KINDS[kind](dims, ambient_dim, key=KEY, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("squiggly", {"frequency": 0.0}),
        ("squiggly", {"kappa": 0.0}),
        ("squiggly", {"kappa": 1.5}),
        ("spline_flow", {"num_bins": 0}),
        ("spline_flow", {"bound": -1.0}),
        ("spline_flow", {"roughness": -0.1}),
    ],
)
def test_impossible_warps_are_refused(kind, options):
    with pytest.raises(ValueError, match=rf"{kind}.*{next(iter(options))}"):
        KINDS[kind]((1,), 3, key=KEY, **options)


def test_a_mixture_refuses_an_impossible_number():
    with pytest.raises(ValueError, match="num=0"):
        mixture("squiggly").sample(0, key=KEY)
    with pytest.raises(TypeError, match="WarpedMixture"):
        mixture("squiggly").sample(1, key=None)
