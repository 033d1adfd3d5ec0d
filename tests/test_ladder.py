"""What the tiers of `benchmarks/memorization.py` compute beside the library's own functions."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mmh_jax.memorization import Label, neighbor_lid


@pytest.fixture(scope="module")
def ladder():
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        pytest.importorskip("matplotlib")
        import memorization

        yield memorization
    finally:
        sys.path.remove(folder)


def test_otsu_is_the_cut_that_an_exhaustive_search_finds(ladder):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 60), rng.normal(6, 1, 20)])

    def between(cut):
        low, high = values[values <= cut], values[values > cut]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    found = ladder.templates.otsu(values.reshape(8, 10))
    best = max(values[values < values.max()], key=between)
    assert np.array_equal(values > found, values > best)


def test_a_map_is_judged_by_its_pixels(ladder):
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    right, wrong = mask.astype(float), 1.0 - mask
    assert ladder.templates.overlap(right, mask) == 1
    assert ladder.templates.overlap(wrong, mask) == 0
    found = ladder.templates.judged(np.stack([right, wrong]), mask)
    assert found["AUROC"] == 0.5
    assert found["IoU"] == 0.5
    half = right.copy()
    half[1, 1] = 0
    assert ladder.templates.overlap(half, mask) == 0.75


def c1_run():
    kinds = np.array(["exact", "exact", "exact", "noisy", "single", "held out", "held out"])
    return {
        "kinds": kinds,
        "counts": np.array([64, 16, 2, 16, 1, 0, 0]),
        "extracted": np.array([5, 0, 2, 1, 0, 0, 0]),
        "png": np.array([10.0, 10, 10, 10, 10, 11, 90]),
        "values": {"flipd": np.array([0.0, -1, -2, -3, -4, -5, -6])},
    }


def test_only_what_a_sample_extracted_is_memorized(ladder):
    run, duplicates = c1_run(), ladder.duplicates
    exact = duplicates.positives(run, "exact")
    assert exact.tolist() == [True, *[False] * 6]  # 16 times but not extracted, 2 times: neither
    assert np.flatnonzero(duplicates.positives(run, "near")).tolist() == [3]
    pools = {pool: duplicates.pool_of(pool, run, exact) for pool in duplicates.POOLS}
    assert np.flatnonzero(pools["held out"]).tolist() == [5, 6]
    assert np.flatnonzero(pools["not extracted"]).tolist() == [1, 4]
    assert np.flatnonzero(pools["same size"]).tolist() == [5]


def test_dose_response_counts_by_kind_and_number(ladder):
    run = c1_run() | {"dimension": np.arange(7.0)}
    rows = ladder.duplicates.dose_response([run])
    found = {(row["pictures"], row["copies"]): row for row in rows}
    assert found["exact", 64]["extracted"] == "1.000"
    assert found["exact", 16]["extracted"] == "0.000"
    assert found["held out", 0]["median LID_theta"] == "5.500"


def test_planting_keeps_the_three_kinds_apart(ladder):
    duplicates = ladder.duplicates
    sizes = duplicates.SIZES["smoke"]
    points = np.random.default_rng(0).uniform(size=(sizes.num_points, 8, 8)).astype(np.float32)
    data = duplicates.planted(points, sizes, seed=0)
    for kind, count in (("exact", 4), ("exact", 16), ("shifted", 8), ("noisy", 8)):
        rows = data.rows[(data.kinds == kind) & (data.counts == count)]
        assert len(rows) == sizes.num_planted
        for row in rows:
            same = data.points[data.groups == data.groups[row]]
            assert len(same) == count
            assert (len(np.unique(same, axis=0)) == 1) == (kind == "exact")
    singles = data.rows[data.kinds == "single"]
    assert all(np.sum(data.groups == data.groups[row]) == 1 for row in singles)


def test_balanced_accuracy_of_verdicts(ladder):
    verdicts = ladder.verdicts
    kinds = [verdicts.SINGLE] * 4 + [verdicts.DUPLICATE] * 2 + [verdicts.SHAPE] * 2
    labels = [Label.OD_MEM] * 3 + [Label.UNDECIDED] + [Label.DD_MEM] * 3 + [Label.NOT_MEMORIZED]
    found = verdicts.balanced({"kinds": kinds, "sources": {"x": {"labels": labels}}}, "x")
    assert found[verdicts.SINGLE] == 0.75
    assert found[verdicts.SHAPE] == 0.5
    assert found["balanced accuracy"] == (0.75 + 0.75) / 2
    assert found["undecided"] == 1 / 8


def test_spots_are_a_curve(ladder):
    points = ladder.verdicts.spots(400, 8, np.random.default_rng(0)).reshape(400, -1)
    assert abs(np.median(neighbor_lid(points).value) - 1) < 0.1


def test_cells_are_of_a_width_and_a_number(ladder):
    scale = ladder.scale

    def run(width, seed, auroc):
        judged = {"AUROC": auroc, "TPR at 1% FPR": 0.5}
        judged = None if auroc is None else dict.fromkeys(scale.DETECTORS, judged)
        return {
            "width": width, "pictures": 10, "seed": seed, "memorized": 0.1 * seed,
            "detections": judged,
        }  # fmt: skip

    rows = scale.cells([run(4, 1, 0.8), run(4, 2, 0.9), run(8, 1, None), run(8, 2, 0.7)])
    assert [row["width"] for row in rows] == [4, 8]
    assert rows[0]["copies"] == pytest.approx(0.15)
    assert rows[0]["residual"] == pytest.approx(0.85)
    # Half a width over 1.96 of a 95% interval of Student's t with one degree of freedom.
    assert rows[0]["+- residual"] == pytest.approx(0.05 * 12.706 / 1.96, rel=1e-3)
    assert rows[1]["seeds judged"] == 1
    assert rows[1]["residual"] == 0.7


def test_prompts_have_one_trigger_where_they_should(ladder):
    from ladder import conditions

    kinds = np.arange(10)
    has_trigger = np.arange(10) % 2 == 0
    words, places = conditions.prompts(kinds, has_trigger, np.random.default_rng(0))
    assert words.shape == (10, conditions.NUM_WORDS + 1)
    assert ((words == conditions.TRIGGER).sum(axis=1) == has_trigger).all()
    assert (places >= 0).tolist() == has_trigger.tolist()
    assert all(words[row, places[row]] == conditions.TRIGGER for row in np.flatnonzero(has_trigger))
    assert all(kind in row for kind, row in zip(kinds, words, strict=True))
    assert (words[:, -1] == conditions.END).all()


def test_checkpoints_are_of_their_steps_and_read_again(ladder, tmp_path):
    from ladder import trained

    points = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    about = trained.Training(width=8, num_steps=40, batch_size=8)
    folders = {4: tmp_path / "a", 20: tmp_path / "b", 40: tmp_path / "c"}
    first = trained.checkpoints(points, about, 0, folders, half_life=4.0)
    again = trained.checkpoints(points, about, 1, folders, half_life=4.0)  # read, whatever the seed
    x = points[0]
    answers = [np.asarray(model(x, 0.5)) for model in first]
    assert all(np.array_equal(a, model(x, 0.5)) for a, model in zip(answers, again, strict=True))
    assert not np.allclose(answers[0], answers[1])
    assert not np.allclose(answers[1], answers[2])
    # The last is that of a training without checkpoints.
    alone = trained.checkpoints(points, about, 0, {40: tmp_path / "d"}, half_life=4.0)
    np.testing.assert_allclose(alone[0](x, 0.5), answers[2], rtol=1e-5)


def test_what_is_kept_is_not_made_again(ladder, tmp_path):
    from ladder import trained

    path = tmp_path / "deep" / "found.json"
    assert trained.kept(path, lambda: {"a": 1}) == {"a": 1}
    assert trained.kept(path, lambda: pytest.fail("made again")) == {"a": 1}


def test_a_score_that_is_not_known_does_not_accuse(ladder):
    from ladder import trained

    values = trained.ranked(np.array([np.nan, 1.0, 2.0]))
    found = trained.detected(values, np.array([False, True, True]))
    assert found.auroc.value == 1
