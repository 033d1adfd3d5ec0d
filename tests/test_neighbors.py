import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from mmh_jax import lid
from mmh_jax.lid import approximate_search, neighbor_search, neighbors
from mmh_jax.lid.neighbors import nearest_neighbors

RNG = np.random.default_rng(0)


def brute_force(points, num_neighbors, queries=None):
    """Every distance by difference in float64; equal distances in the order of their index."""
    points = np.asarray(points, np.float64).reshape(len(points), -1)
    among_themselves = queries is None
    queries = (
        points if queries is None else np.asarray(queries, np.float64).reshape(len(queries), -1)
    )
    distances = np.stack([np.sqrt(((points - query) ** 2).sum(1)) for query in queries])
    if among_themselves:
        np.fill_diagonal(distances, np.inf)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :num_neighbors]
    return np.take_along_axis(distances, indices, axis=1), indices


def duplicated(points, fraction=0.3):
    num = int(fraction * len(points))
    points[RNG.choice(len(points), num, replace=False)] = points[:num]
    return points


def clusters(scale):
    centres = RNG.normal(size=(20, 30))
    return centres[RNG.integers(0, 20, 600)] + scale * RNG.normal(size=(600, 30))


SETS = {
    "line": RNG.normal(size=(700, 1)),
    "normal": RNG.normal(size=(600, 30)),
    "many coordinates": RNG.uniform(size=(600, 12, 12, 3)),
    "duplicates": duplicated(RNG.normal(size=(600, 30))),
    "one point 200 times": np.where(np.arange(600)[:, None] < 200, 0.3, RNG.normal(size=(600, 30))),
    "loose clusters": clusters(1e-2),
    "tight clusters": clusters(1e-3),
    "very tight clusters": clusters(1e-5),
    "close and far from 0": 10 + 1e-4 * RNG.normal(size=(600, 30)),
    "one outlier": np.where(np.arange(600)[:, None] == 5, 1e5, RNG.normal(size=(600, 30))),
    "huge": 1e30 * RNG.normal(size=(600, 30)),
    "tiny": 1e-30 * RNG.normal(size=(600, 30)),
    "far apart in scale": np.exp(RNG.uniform(-40, 40, size=(600, 1))) * RNG.normal(size=(600, 30)),
}


@pytest.mark.parametrize("name", SETS)
def test_exact_on(name):
    points = SETS[name].astype(np.float32)
    found = nearest_neighbors(points, 7, block_size=128)
    distances, indices = brute_force(points, 7)
    assert found.distances.dtype == np.float32
    np.testing.assert_allclose(found.distances, distances, rtol=1e-5)
    # An index may differ only where float32 cannot tell the distances apart.
    differ = found.indices != indices
    flat = points.reshape(len(points), -1).astype(np.float64)
    rows = np.nonzero(differ)[0]
    by_index = np.linalg.norm(flat[rows] - flat[found.indices[differ]], axis=1)
    np.testing.assert_allclose(by_index, distances[differ], rtol=1e-5)
    assert differ.mean() < 0.005
    assert not np.any(found.indices == np.arange(len(points))[:, None])


@pytest.mark.parametrize("name", ["normal", "duplicates", "line"])
def test_agrees_with_scikit_learn(name):
    points = SETS[name].astype(np.float32)
    queries = np.concatenate([points[:50], points[:100] + np.float32(0.01)])
    search = NearestNeighbors(n_neighbors=5, algorithm="ball_tree").fit(points.astype(np.float64))
    np.testing.assert_allclose(
        nearest_neighbors(points, 5, queries=queries).distances,
        search.kneighbors(queries.astype(np.float64))[0],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        nearest_neighbors(points, 5).distances, search.kneighbors()[0], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_close_pair_far_from_the_origin(dtype):
    """1e-4 apart at 10: the product formula alone would be off by 1e-6 * 100 / 1e-8."""
    points = (10 + RNG.normal(size=(300, 8))).astype(dtype)
    points[1::2] = points[::2] + np.array(1e-4 / 8**0.5, dtype)
    found = nearest_neighbors(points, 3)
    distances, indices = brute_force(points, 3)
    np.testing.assert_array_equal(found.indices[:, 0], indices[:, 0])
    tolerance = 1e-4 if dtype == np.float32 else 5e-3  # a spread of 1 is rounded to float32
    np.testing.assert_allclose(found.distances, distances, rtol=tolerance)


def test_float64_points_are_centred_before_they_are_rounded():
    points = 1e6 + RNG.normal(size=(100, 3))
    np.testing.assert_allclose(
        nearest_neighbors(points, 4).distances, brute_force(points, 4)[0], rtol=1e-4
    )
    queries = points[:7] + 0.1
    np.testing.assert_allclose(
        nearest_neighbors(points, 4, queries=queries).distances,
        brute_force(points, 4, queries)[0],
        rtol=1e-4,
    )


def test_duplicates_are_neighbours_at_distance_zero():
    points = np.repeat(RNG.normal(size=(50, 6)), 3, axis=0).astype(np.float32) + 10
    found = nearest_neighbors(points, 3)
    np.testing.assert_array_equal(found.distances[:, :2], 0)
    assert np.all(found.distances[:, 2] > 0.1)
    assert np.all(found.indices[:, :2] // 3 == np.arange(150)[:, None] // 3)
    nudged = points.copy()
    nudged[1] = np.nextafter(points[1], np.float32(np.inf))  # one unit in the last place
    assert nearest_neighbors(nudged, 1).distances[1, 0] > 0


def test_equal_distances_come_in_order_of_index():
    grid = np.stack(np.meshgrid(*[np.arange(12.0)] * 2), -1).reshape(-1, 2)
    found = nearest_neighbors(grid, 20, block_size=50)
    distances, indices = brute_force(grid, 20)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_array_equal(found.distances, distances.astype(np.float32))
    copies = nearest_neighbors(np.ones((300, 2)), 40, block_size=64)
    np.testing.assert_array_equal(copies.indices[100], np.arange(40))
    np.testing.assert_array_equal(copies.indices[5], np.delete(np.arange(41), 5))


@pytest.mark.parametrize("block_size", [1, 37, 64, 5000])
def test_blocks_do_not_matter(block_size):
    points = SETS["normal"][:120].astype(np.float32)
    queries = SETS["normal"][100:220].astype(np.float32)
    for kind in (None, queries):
        found = nearest_neighbors(points, 11, queries=kind, block_size=block_size)
        distances, indices = brute_force(points, 11, kind)
        np.testing.assert_array_equal(found.indices, indices)
        np.testing.assert_allclose(found.distances, distances, rtol=1e-5)


def test_queries_are_not_excluded_from_the_points():
    points = SETS["normal"].astype(np.float32)
    found = nearest_neighbors(points, 1, queries=points[10:20])
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(10, 20))
    np.testing.assert_array_equal(found.distances, 0)


@pytest.mark.parametrize("num_neighbors", [1, 9])
def test_all_the_others(num_neighbors):
    points = RNG.normal(size=(num_neighbors + 1, 2)).astype(np.float32)
    distances, indices = brute_force(points, num_neighbors)
    found = nearest_neighbors(points, num_neighbors)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-5)
    every = nearest_neighbors(points, num_neighbors + 1, queries=points)
    np.testing.assert_array_equal(np.sort(every.indices), [range(num_neighbors + 1)] * len(points))


def test_numbers_and_images_are_points():
    line = np.array([0.0, 1.0, 3.0])
    np.testing.assert_array_equal(nearest_neighbors(line, 1).indices, [[1], [0], [1]])
    digits = load_digits().images[:300] / 16
    distances, _ = brute_force(digits, 5)
    np.testing.assert_allclose(nearest_neighbors(digits, 5).distances, distances, rtol=1e-5)


def test_the_filter_decides_almost_always(monkeypatch):
    """Searching by difference is the exception: never in a cloud, always in tight clusters."""
    redone = []
    by_difference = neighbors.by_difference

    def spy(num_neighbors, mesh):
        find = by_difference(num_neighbors, mesh)
        return lambda space, queries, own: redone.append(len(queries)) or find(space, queries, own)

    monkeypatch.setattr(neighbors, "by_difference", spy)
    for name in (
        "normal",
        "many coordinates",
        "duplicates",
        "close and far from 0",
        "huge",
        "tiny",
    ):
        nearest_neighbors(SETS[name].astype(np.float32), 7)
    assert redone == []
    nearest_neighbors(SETS["one point 200 times"].astype(np.float32), 7)
    assert redone[0] >= 200
    nearest_neighbors(SETS["very tight clusters"].astype(np.float32), 7)
    assert redone[1] > 500


def test_never_a_matrix_of_all_distances(monkeypatch):
    """Beside the points there are blocks in memory, not rows of distances to all points."""
    monkeypatch.setattr(
        neighbor_search, "over_points", lambda find, in_axes, **_: jax.vmap(find, in_axes)
    )
    for num_points in (20_000, 80_000):
        points = np.zeros((num_points, 2), np.float32)
        num_blocks = -(-num_points // 1024)
        space = neighbor_search.space_of(points, np.zeros(2), 1024, num_blocks, 1.0)
        space = neighbor_search.with_sides(space, 1)
        for find in (
            neighbor_search.by_filter.__wrapped__(5, 21, 256, None),
            neighbor_search.by_difference.__wrapped__(5, None),
        ):
            program = jax.jit(find).lower(space, points[:256], np.arange(256)).compile()
            assert program.memory_analysis().temp_size_in_bytes < 12 * 256 * 1024 * 4


@pytest.mark.parametrize("num", [3, 20, 40])
def test_the_largest_of_groups_are_the_largest(num):
    for values in (RNG.normal(size=640), RNG.integers(0, 9, 640).astype(float), np.zeros(640)):
        largest, places = neighbor_search._largest(jnp.asarray(values), num, None)
        np.testing.assert_array_equal(largest, np.sort(values)[::-1][:num].astype(np.float32))
        np.testing.assert_array_equal(values[places].astype(np.float32), largest)
        assert len(set(places.tolist())) == num


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [1, 3, 50, 784])
def test_bounds_are_below_the_squared_distances(x64, dtype, dim):
    """Of points near and far, far from the origin, equal, and padded."""
    points = RNG.normal(size=(90, dim)) * 10.0 ** RNG.uniform(-6, 1, (90, 1))
    points = (points + 3.0).astype(dtype)
    points[60:70] = points[0]
    centre = np.asarray(points.mean(axis=0), dtype)
    space = neighbor_search.space_of(points, centre, 24, 4, 0.0)
    space = neighbor_search.with_sides(space, 2)
    for query in points[::9]:
        bounds, indices = neighbor_search._least_bounds(space, query, 0, 96, None)
        bounds, indices = np.asarray(bounds), np.asarray(indices)
        assert sorted(indices[:90].tolist()) == list(range(90))
        assert np.all(np.isinf(bounds[90:]))
        exact = np.sum((points[indices[:90]].astype(float) - query.astype(float)) ** 2, axis=1)
        exact *= float(space.scale) ** 2
        assert np.all(bounds[:90] <= exact)
        size = float(space.scale) ** 2 * np.sum((query.astype(float) - centre) ** 2)
        near = exact < 1e-3 * size
        assert np.all(exact[near] - bounds[:90][near] < 100 * dim**0.5 * np.finfo(dtype).eps * size)


def test_progress():
    calls = []
    nearest_neighbors(
        SETS["normal"], 3, block_size=250, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(250, 600), (500, 600), (600, 600)]


def test_64_bit_mode():
    points = SETS["normal"][:100]
    with jax.enable_x64(True):
        found = nearest_neighbors(points, 3)
    assert found.distances.dtype == np.float64
    np.testing.assert_allclose(found.distances, brute_force(points, 3)[0], rtol=1e-13)


coordinates = st.sampled_from([0.0, 1.0, -1.0, 3.0, 1e-6, 1e6]) | st.floats(-2, 2, width=32)


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, (20, 2), elements=coordinates))
def test_exact_on_anything(points):
    found = nearest_neighbors(points, 3, block_size=8)
    # Subnormal differences, one in each coordinate, count as 0.
    flushed = 2**0.5 * np.finfo(np.float32).tiny
    np.testing.assert_allclose(found.distances, brute_force(points, 3)[0], rtol=1e-5, atol=flushed)


def test_errors_name_argument_fault_and_cure():
    points = np.ones((5, 2))
    for num_neighbors, words in ((5, "exceeds the 4"), (0, "at least 1"), (2.0, "integer")):
        with pytest.raises(ValueError, match=f"num_neighbors={num_neighbors}.*{words}"):
            nearest_neighbors(points, num_neighbors)
    with pytest.raises(ValueError, match="exceeds the 5"):
        nearest_neighbors(points, 6, queries=points)
    with pytest.raises(ValueError, match="block_size=0"):
        nearest_neighbors(points, 1, block_size=0)
    with pytest.raises(TypeError, match=r"points=.*int64.*astype"):
        nearest_neighbors(points.astype(np.int64), 1)
    with pytest.raises(TypeError, match=r"queries=.*uint8"):
        nearest_neighbors(points, 1, queries=points.astype(np.uint8))
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        nearest_neighbors(points, 1, queries=np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"queries=.*shape \(0, 2\)"):
        nearest_neighbors(points, 1, queries=np.ones((0, 2)))
    points[3, 1] = np.nan
    points[4, 0] = np.inf
    with pytest.raises(ValueError, match=r"points=.*2 of 5 rows, row 3 the first; remove"):
        nearest_neighbors(points, 1)


def same(found, expected):
    """Up to the last bits, in which two distances may change places."""
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-6)
    steps = np.diff(expected.distances, axis=1, prepend=-np.inf, append=np.inf)
    near = 4e-6 * np.pad(expected.distances, [(0, 0), (0, 1)], mode="edge")
    alone = (steps > near) | (near == 0)  # copies of the query come in the order of their index
    alone[:, -1] = False  # the next may be as near as the last
    certain = alone[:, :-1] & alone[:, 1:]
    np.testing.assert_array_equal(found.indices[certain], expected.indices[certain])


@pytest.mark.parametrize("name", ["normal", "duplicates", "one point 200 times", "one outlier"])
@pytest.mark.parametrize("part", [30 * 64, 30 * 599, 30 * 5])
def test_parts_do_not_matter(name, part, monkeypatch):
    points = SETS[name].astype(np.float32)
    whole = nearest_neighbors(points, 7), nearest_neighbors(points, 7, queries=points[:50] + 0.01)
    monkeypatch.setattr(neighbors, "_PART", part)
    same(nearest_neighbors(points, 7), whole[0])
    same(nearest_neighbors(points, 7, queries=points[:50] + np.float32(0.01)), whole[1])


def test_a_memory_mapped_file_and_an_iterator_are_read_in_parts(tmp_path, monkeypatch):
    points = SETS["normal"]
    expected = nearest_neighbors(points, 5, queries=points[:40])
    np.save(tmp_path / "points.npy", points)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    monkeypatch.setattr(neighbors, "_PART", 30 * 100)
    same(nearest_neighbors(mapped, 5, queries=points[:40]), expected)
    same(nearest_neighbors(mapped, 5), nearest_neighbors(points, 5))
    parts = (points[start : start + 77] for start in range(0, 600, 77))
    same(nearest_neighbors(parts, 5, queries=points[:40]), expected)
    same(nearest_neighbors([points[:3], points[3:]], 5, queries=points[:40]), expected)
    nested = [[0.0, 1.0], [2.0, 3.0], [0.0, 2.0]]
    assert nearest_neighbors([np.array(row) for row in nested], 1).indices[0, 0] == 2
    assert nearest_neighbors(nested, 1).indices.tolist() == [[2], [2], [0]]


def test_a_short_last_part_has_the_blocks_of_the_others(monkeypatch):
    shapes = []
    of_part = neighbors.space_of

    def spy(*rest):
        space = of_part(*rest)
        shapes.append(space.blocks.shape)
        return space

    monkeypatch.setattr(neighbors, "space_of", spy)
    monkeypatch.setattr(neighbors, "_PART", 30 * 400)
    nearest_neighbors(SETS["normal"][:599], 5, block_size=40)
    assert shapes == [(2, 152, 30)] * 2


def test_float64_parts_are_centred(monkeypatch):
    points = 1e6 + RNG.normal(size=(100, 3))
    monkeypatch.setattr(neighbors, "_PART", 3 * 30)
    np.testing.assert_allclose(
        nearest_neighbors(points, 4).distances, brute_force(points, 4)[0], rtol=1e-4
    )
    halves = nearest_neighbors(iter([points[:50], points[50:]]), 4, queries=points)
    np.testing.assert_allclose(
        halves.distances, brute_force(points, 4, points)[0], rtol=1e-4, atol=1e-6
    )


def test_a_row_is_excluded_for_each_query():
    points = SETS["duplicates"].astype(np.float32)
    index = np.array([4, 17, 599, 3])
    found = nearest_neighbors(points, 6, queries=points[index], exclude=index)
    same(found, neighbors.Neighbors(*(f[index] for f in nearest_neighbors(points, 6))))
    same(
        nearest_neighbors(points, 6, queries=points[index], exclude=index.astype(np.uint32)), found
    )
    some = nearest_neighbors(points, 6, queries=points[index], exclude=[4, -1, -1, 3])
    assert some.indices[1, 0] in (17, *np.flatnonzero((points == points[17]).all(axis=1)))
    np.testing.assert_array_equal(some.indices[0], found.indices[0])


def devices(shape, names):
    num = int(np.prod(shape))
    if jax.device_count() < num:
        pytest.skip(f"needs {num} devices; XLA_FLAGS was set to fewer")
    automatic = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=automatic, devices=jax.devices()[:num])


@pytest.mark.parametrize(
    ("shape", "names"),
    [((8,), ("data",)), ((8,), ("points",)), ((2, 4), ("data", "points"))],
)
@pytest.mark.parametrize("name", ["normal", "one point 200 times", "very tight clusters"])
def test_devices_do_not_matter(name, shape, names):
    points = SETS[name].astype(np.float32)
    mesh = devices(shape, names)
    for k in (7, 90):
        same(nearest_neighbors(points, k, block_size=32, mesh=mesh), nearest_neighbors(points, k))
    few = nearest_neighbors(points[:9], 8, mesh=mesh)
    same(few, nearest_neighbors(points[:9], 8))


def test_an_answer_is_proved_on_every_device():
    """A tight cluster that lies on the last devices alone: the first have nothing to object."""
    points = RNG.normal(size=(600, 30))
    points[480:] = 10 + 1e-5 * RNG.normal(size=(120, 30))
    points = points.astype(np.float32)
    found = nearest_neighbors(points, 7, block_size=32, mesh=devices((8,), ("points",)))
    np.testing.assert_allclose(found.distances, brute_force(points, 7)[0], rtol=1e-5)


def test_what_cannot_be_read_in_parts_is_named():
    points = np.ones((5, 2))
    with pytest.raises(ValueError, match=r"iterable; pass `queries="):
        nearest_neighbors(iter([points]), 1)
    with pytest.raises(ValueError, match="exceeds the 10 points"):
        nearest_neighbors(iter([points, points]), 11, queries=points)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        nearest_neighbors(iter([points]), 1, queries=np.ones((2, 3)))
    with pytest.raises(ValueError, match="exclude="):
        nearest_neighbors(points, 1, queries=points, exclude=[1, 2])
    bad = np.ones((4, 2))
    bad[2] = np.nan
    with pytest.raises(ValueError, match=r"1 of 4 rows, row 7 the first"):
        nearest_neighbors(iter([points, bad]), 1, queries=points)


def recall_of(found, exact):
    """The share of the neighbours that was found, and whether the distances of those are right."""
    hits = [len(np.intersect1d(*rows)) for rows in zip(found.indices, exact.indices, strict=True)]
    return sum(hits) / exact.indices.size


SEARCHES = {
    "approximate": lambda: lid.approximate(0.9),
    "descent": lambda: lid.nn_descent(seed=1),
}


# Its import compiles for half a minute: one process does it.
@pytest.mark.xdist_group("descent")
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("asked", ["the points", pytest.param("others", marks=pytest.mark.slow)])
def test_a_search_that_may_miss_some(name, asked):
    if name == "descent":
        pytest.importorskip("pynndescent")
    points = SETS["normal"].astype(np.float32)
    queries = None if asked == "the points" else points[:50] + np.float32(0.01)
    found = nearest_neighbors(points, 10, queries=queries, search=SEARCHES[name]())
    exact = nearest_neighbors(points, 10, queries=queries)
    assert recall_of(found, exact) > 0.9
    # What it found has its true distance, in ascending order, and no point is its own neighbour.
    from_ = points if queries is None else queries
    true = np.linalg.norm(points[found.indices] - from_[:, None], axis=2)
    np.testing.assert_allclose(found.distances, true, rtol=1e-5)
    assert np.all(np.diff(found.distances) >= 0)
    assert np.all(found.distances >= exact.distances * (1 - 1e-6))
    if queries is None:
        assert not np.any(found.indices == np.arange(len(points))[:, None])


@pytest.mark.xdist_group("descent")
def test_descent_with_duplicates_and_few_points():
    pytest.importorskip("pynndescent")
    points = SETS["one point 200 times"].astype(np.float32)
    found = nearest_neighbors(points, 12, search=lid.nn_descent())
    assert np.all(found.distances[:200] == 0)
    few = RNG.normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        nearest_neighbors(few, 6, search=lid.nn_descent()).indices,
        nearest_neighbors(few, 6).indices,
    )


def test_what_a_graph_lacks_is_searched_exactly(monkeypatch):
    points = SETS["normal"].astype(np.float32)
    exact = nearest_neighbors(points, 5)
    nothing = lambda self, points, queries, num: np.full((600, num), -1)  # noqa: E731
    monkeypatch.setattr(approximate_search.NNDescent, "candidates", nothing)
    found = nearest_neighbors(points, 5, search=approximate_search.NNDescent(0, ()))
    np.testing.assert_array_equal(found.indices, exact.indices)
    np.testing.assert_array_equal(found.distances, exact.distances)


def test_searches_that_cannot_be():
    descent = approximate_search.NNDescent(0, ())
    points = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="takes an array of points and no mesh"):
        nearest_neighbors(iter([points]), 1, queries=points, search=descent)
    with pytest.raises(ValueError, match="exceeds the 3 points"):
        nearest_neighbors(points, 4, search=descent)
    with pytest.raises(ValueError, match="between 0 and 1"):
        lid.approximate(1.5)


def test_the_selection_of_a_tpu_is_asked_for():
    def text(platform, recall):
        run = jax.jit(jax.vmap(lambda values: neighbor_search._largest(values, 22, recall)))
        asked = jax.ShapeDtypeStruct((4, 256), np.float32)
        return jax.export.export(run, platforms=[platform])(asked).mlir_module()

    assert "ApproxTopK" in text("tpu", 0.9)
    assert "ApproxTopK" not in text("tpu", None) + text("cpu", 0.9) + text("cuda", 0.9)
