import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmh_jax import lid
from mmh_jax.data import augment
from mmh_jax.data.planting import plant_duplicates, plant_template, rectangle
from mmh_jax.data.splits import deduplicated, disjoint_halves

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(40, 6, 5)).astype(np.float32)

seeds = st.integers(0, 2**32 - 1)
few = settings(deadline=None, max_examples=30)


def small_sets(least=1):
    """Sets of few values, so that rows coincide."""
    return st.lists(st.integers(0, 6), min_size=least, max_size=25).map(
        lambda values: np.array(values, np.float32)[:, None] * np.ones((1, 3), np.float32)
    )


# Duplicates


@few
@given(
    points=small_sets(),
    copies=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_planted=st.integers(1, 3),
    seed=seeds,
)
def test_counts_are_exact(points, copies, num_planted, seed):
    key = jax.random.key(seed)
    _, inverse, counts = np.unique(points[:, 0], return_inverse=True, return_counts=True)
    single = int(np.sum(counts == 1))
    wanted = num_planted * len(copies)
    if wanted > single:
        with pytest.raises(ValueError, match=f"only {single} have no duplicate"):
            plant_duplicates(points, copies=copies, num_planted=num_planted, key=key)
        return
    planted = plant_duplicates(points, copies=copies, num_planted=num_planted, key=key)
    np.testing.assert_array_equal(planted.points[: len(points)], points)
    np.testing.assert_array_equal(planted.points, points[planted.origin])
    np.testing.assert_array_equal(planted.counts, np.repeat(copies, num_planted))
    assert len(planted.points) == len(points) + num_planted * sum(c - 1 for c in copies)
    assert len(set(planted.rows)) == wanted
    assert not planted.distance.any()
    for row, count in zip(planted.rows, planted.counts, strict=True):
        assert np.sum(planted.points[:, 0] == points[row, 0]) == count
        assert np.sum(planted.origin == row) == count
    untouched = np.setdiff1d(np.arange(len(points)), planted.rows)
    for row in untouched:
        assert np.sum(planted.points[:, 0] == points[row, 0]) == counts[inverse[row]]


def test_another_key_chooses_others():
    chosen = {
        tuple(plant_duplicates(IMAGES, copies=2, num_planted=3, key=jax.random.key(seed)).rows)
        for seed in range(20)
    }
    assert len(chosen) == 20
    assert len({row for rows in chosen for row in rows}) > 25


@pytest.mark.parametrize(
    ("perturb", "size"),
    [
        (augment.noise(0.1), 0.1 * 30**0.5),
        (augment.brightness(0.1), None),
        (augment.shift(1), None),
    ],
    ids=["noise", "brightness", "shift"],
)
def test_near_duplicates(perturb, size):
    planted = plant_duplicates(IMAGES, copies=(1, 51), num_planted=2, key=KEY, perturb=perturb)
    np.testing.assert_array_equal(planted.points[:40], IMAGES)
    added = planted.points[40:]
    assert added.shape == (100, 6, 5)
    origin = IMAGES[planted.origin[40:]]
    distance = np.linalg.norm((added - origin).reshape(100, -1), axis=1)
    np.testing.assert_allclose(planted.distance[40:], distance, rtol=1e-5)
    assert not planted.distance[:40].any()
    if size is not None:  # chi of 30 degrees of freedom
        assert abs(distance.mean() - size) < 4 * 0.1 / 2**0.5 / 10
        assert len(deduplicated(added).counts) == 100
    else:
        assert distance.max() > 0
    if perturb == augment.brightness(0.1):
        assert np.abs(added - origin).max() <= 0.1 + 1e-6
    if perturb == augment.shift(1):  # nine places
        assert len(deduplicated(added).counts) == 18


def test_each_copy_has_its_own_perturbation_over_many_calls(monkeypatch):
    from mmh_jax.data import planting

    noise = augment.noise(0.1)
    whole = plant_duplicates(IMAGES, copies=20, num_planted=2, key=KEY, perturb=noise)
    monkeypatch.setattr(planting, "_CHUNK", 7)
    parts = plant_duplicates(IMAGES, copies=20, num_planted=2, key=KEY, perturb=noise)
    np.testing.assert_allclose(parts.points, whole.points, rtol=1e-6)
    assert deduplicated(whole.points).counts.max() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"copies": 0}, "at least 1"),
        ({"copies": (2, 0)}, "at least 1"),
        ({"copies": ()}, "at least 1"),
        ({"copies": 1.5}, "at least 1"),
        ({"num_planted": 0}, "positive integer"),
        ({"num_planted": 41}, "only 40"),
        ({"perturb": augment.crop(2, 2)}, "keeps the shape"),
    ],
)
def test_duplicates_that_are_refused(options, words):
    arguments = {"copies": 2, "num_planted": 1, "key": KEY} | options
    with pytest.raises(ValueError, match=words):
        plant_duplicates(IMAGES, **arguments)


# Templates


@few
@given(
    num_planted=st.integers(2, 12),
    top=st.integers(0, 3),
    left=st.integers(0, 2),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    seed=seeds,
)
def test_template(num_planted, top, left, height, width, seed):
    mask = rectangle((6, 5), top=top, left=left, height=height, width=width)
    assert mask.sum() == height * width
    planted = plant_template(IMAGES, mask=mask, num_planted=num_planted, key=jax.random.key(seed))
    assert len(set(planted.rows)) == num_planted
    template = planted.rows[0]
    np.testing.assert_array_equal(planted.points[template], IMAGES[template])
    part = planted.points[:, mask]
    same = np.all(part == IMAGES[template][mask], axis=1)
    np.testing.assert_array_equal(np.flatnonzero(same), np.sort(planted.rows))
    np.testing.assert_array_equal(planted.points[:, ~mask], IMAGES[:, ~mask])
    rest = np.setdiff1d(np.arange(40), planted.rows)
    np.testing.assert_array_equal(planted.points[rest], IMAGES[rest])


def test_a_part_that_others_have_is_no_template():
    """Digits are black at the corners: only rows whose part is theirs alone can be one."""
    images = IMAGES.copy()
    mask = rectangle((6, 5), top=0, left=0, height=2, width=2)
    images[:39, mask] = 0
    for seed in range(5):
        found = plant_template(images, mask=mask, num_planted=3, key=jax.random.key(seed))
        assert found.rows[0] == 39
    images[:, mask] = 0
    with pytest.raises(ValueError, match="only 0 have this part alone"):
        plant_template(images, mask=mask, num_planted=3, key=KEY)


@pytest.mark.parametrize(
    ("mask", "num_planted", "words"),
    [
        (np.zeros((6, 5), bool), 2, "True in 0 places"),
        (np.ones((6, 5), bool), 2, "True in 30 places"),
        (np.ones((6, 4), bool), 2, "shape"),
        (np.eye(6, 5), 2, "bool"),
        (np.eye(6, 5, dtype=bool), 1, "at least 2"),
        (np.eye(6, 5, dtype=bool), 41, "only 39 are left"),
    ],
)
def test_templates_that_are_refused(mask, num_planted, words):
    with pytest.raises(ValueError, match=words):
        plant_template(IMAGES, mask=mask, num_planted=num_planted, key=KEY)


def test_rectangles():
    mask = rectangle((4, 5, 3), top=1, left=0, height=2, width=3)
    assert mask.shape == (4, 5, 3)
    assert mask[1:3, :3].all()
    assert mask.sum() == 18
    for wrong in (
        {"top": 3},
        {"left": 3},
        {"height": 0},
        {"top": -1},
        {"width": 0},
        {"shape": (4,)},
    ):
        options = {"shape": (4, 5), "top": 1, "left": 1, "height": 2, "width": 3} | wrong
        with pytest.raises(ValueError, match="must lie within"):
            rectangle(**options)


# Different rows, and halves


@few
@given(points=small_sets())
def test_deduplicated_is_the_same_as_by_sorting(points):
    unique = deduplicated(points)
    values, first, counts = np.unique(points[:, 0], return_index=True, return_counts=True)
    order = np.argsort(first)
    np.testing.assert_array_equal(unique.points[:, 0], values[order])
    np.testing.assert_array_equal(unique.first, first[order])
    np.testing.assert_array_equal(unique.counts, counts[order])
    np.testing.assert_array_equal(unique.points[unique.cluster], points)
    other = lid.find_duplicates(points)
    for name in ("first", "counts", "cluster"):
        np.testing.assert_array_equal(getattr(unique, name), getattr(other, name))


def test_zeros_of_both_signs_are_equal_and_neighbouring_numbers_are_not():
    points = np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, np.nextafter(1, 2)]])
    assert deduplicated(points).counts.tolist() == [2, 1]
    assert deduplicated(np.array([[1, 2], [1, 2]], np.uint8)).counts.tolist() == [2]


@few
@given(points=small_sets(2), seed=seeds, data=st.data())
def test_halves_part_nothing_that_belongs_together(points, seed, data):
    num = len(points)
    groups = np.array(data.draw(st.lists(st.integers(-2, 8), min_size=num, max_size=num)))
    key = jax.random.key(seed)
    for given_groups in (None, groups):
        try:
            halves = disjoint_halves(points, key=key, groups=given_groups)
        except ValueError:
            # Then all rows are linked.
            reached, labels = {0}, [points[:, 0], *([] if given_groups is None else [groups])]
            for _ in range(num):
                known = [set(label[list(reached)]) for label in labels]
                reached |= {
                    row
                    for row in range(num)
                    for label, values in zip(labels, known, strict=True)
                    if label[row] in values
                }
            assert len(reached) == num
            continue
        assert sorted([*halves.first, *halves.second]) == list(range(num))
        assert len(halves.first) >= len(halves.second) >= 1
        assert not set(points[halves.first, 0]) & set(points[halves.second, 0])
        if given_groups is not None:
            assert not set(groups[halves.first]) & set(groups[halves.second])


@pytest.mark.parametrize("num", [2, 3, 40, 41])
def test_halves_of_single_rows_are_equal_and_random(num):
    points = np.arange(float(num))[:, None]
    found = [disjoint_halves(points, key=jax.random.key(seed)) for seed in range(200)]
    assert all(len(halves.first) - len(halves.second) == num % 2 for halves in found)
    share = np.mean([np.isin(np.arange(num), halves.first) for halves in found], axis=0)
    expected = (num + num % 2) / 2 / num
    assert np.abs(share - expected).max() < 4.5 * 0.5 / 200**0.5


def test_a_large_group_is_filled_up_by_single_rows():
    points = np.arange(100.0)[:, None]
    halves = disjoint_halves(points, key=KEY, groups=np.maximum(np.arange(100), 30))
    assert len(halves.first) == len(halves.second) == 50


def test_near_duplicates_stay_on_one_side():
    planted = plant_duplicates(
        IMAGES, copies=6, num_planted=4, key=KEY, perturb=augment.noise(0.001)
    )
    halves = disjoint_halves(planted.points, key=KEY, groups=planted.origin)
    assert not set(planted.origin[halves.first]) & set(planted.origin[halves.second])
    cluster = lid.find_duplicates(planted.points, tolerance=0.1).cluster
    halves = disjoint_halves(planted.points, key=KEY, groups=cluster)
    assert not set(planted.origin[halves.first]) & set(planted.origin[halves.second])


@pytest.mark.parametrize("groups", [np.zeros(40), np.zeros(39, int), np.zeros((40, 1), int)])
def test_groups_that_are_refused(groups):
    with pytest.raises(ValueError, match="one integer for each"):
        disjoint_halves(IMAGES, key=KEY, groups=groups)


def test_what_cannot_be_split():
    with pytest.raises(ValueError, match="all belong together"):
        disjoint_halves(np.ones((4, 2)), key=KEY)
    with pytest.raises(ValueError, match="all belong together"):
        disjoint_halves(IMAGES, key=KEY, groups=np.zeros(40, int))


@pytest.mark.parametrize(
    "call",
    [
        deduplicated,
        lambda points: disjoint_halves(points, key=KEY),
        lambda points: plant_duplicates(points, copies=2, num_planted=1, key=KEY),
        lambda points: plant_template(points, mask=np.eye(6, 5) > 0, num_planted=2, key=KEY),
    ],
)
def test_points_that_are_refused(call):
    with pytest.raises(TypeError, match="numbers"):
        call(np.array([["a"], ["b"]]))
    for wrong in (np.zeros(4), np.zeros((0, 2)), np.zeros((2, 0))):
        with pytest.raises(ValueError, match="shape"):
            call(wrong)
    holed = IMAGES.copy()
    holed[3, 1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        call(holed)


@pytest.mark.parametrize(
    "call",
    [
        lambda key: disjoint_halves(IMAGES, key=key),
        lambda key: plant_duplicates(IMAGES, copies=2, num_planted=1, key=key),
        lambda key: plant_template(IMAGES, mask=np.eye(6, 5) > 0, num_planted=2, key=key),
    ],
)
def test_a_key_is_needed(call):
    with pytest.raises(TypeError, match="typed key"):
        call(0)
