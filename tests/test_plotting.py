import itertools
import sys

import numpy as np
import pytest

from mmh_jax import evaluation, plotting
from mmh_jax.memorization import Label
from mmh_jax.plotting import dimension_figure
from mmh_jax.typing import Estimate


def estimates(num, *, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, 0, 1, 2], num)
    star = np.where(labels == 2, 0.2, rng.gamma(9.0, 1.0, num))
    theta = np.select([labels == 1, labels == 2], [0.3 * star, 0.1], star + rng.normal(size=num))
    return Estimate(theta, np.full(num, 0.4)), Estimate(star, 0.2 * star), labels


def visible_texts(figure):
    """Each text that is drawn, with its box in pixels."""
    figure.canvas.draw()
    shown = [sub._suptitle for sub in (figure, *figure.subfigs)]
    for axes in figure.axes:
        shown += axes.get_legend().get_texts() if axes.get_legend() else []
        if axes.axison:
            shown += [axes.title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                shown += [tick.label1 for tick in ticks]
    shown = [text for text in shown if text and text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


@pytest.mark.parametrize("num", [30, 1_000, 5_000])
@pytest.mark.parametrize("with_images", [False, True])
def test_no_text_overlaps_another_or_leaves_the_figure(num, with_images):
    theta, star, labels = estimates(num)
    images = np.random.default_rng(0).random((num, 8, 8)) if with_images else None
    figure = dimension_figure(theta, star, labels, images=images, title="a title")
    texts = visible_texts(figure)
    assert len(texts) > (35 if with_images else 15)
    for text, box in texts:
        corners = [(box.x0 + 1, box.y0 + 1), (box.x1 - 1, box.y1 - 1)]
        assert all(figure.bbox.contains(*corner) for corner in corners), text
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert min(width, height) < 1, (one, other)


@pytest.mark.parametrize("shape", [(8, 8), (6, 9, 3)])
def test_the_strips_hold_both_ends_of_lid_theta_in_order(shape):
    theta, star, labels = estimates(100)
    theta.value[7] = np.nan
    images = np.arange(100.0).reshape(100, *[1] * len(shape)) / 100 * np.ones(shape)
    figure = dimension_figure(theta, star, labels, images=images)
    shown = [axes.get_images()[0] for axes in figure.axes if axes.get_images()]
    found = [round(100 * float(np.ravel(image.get_array())[0])) for image in shown]
    order = [index for index in np.argsort(theta.value, kind="stable") if index != 7]
    assert found == [*order[:12], *order[-12:]]


def test_few_points_and_values_that_are_not_finite_are_drawn():
    theta = Estimate(np.array([1.0, np.nan, np.inf, 2.0]), np.array([0.1, np.nan, 0.1, np.inf]))
    star = Estimate(np.array([1.0, 2.0, 3.0, np.nan]), np.full(4, 0.1))
    labels = np.array([Label.DD_MEM, Label.UNDECIDED, Label.NOT_MEMORIZED, Label.UNDECIDED])
    figure = dimension_figure(theta, star, labels, images=np.zeros((4, 5, 5)))
    legend = [text for text, _ in visible_texts(figure)]
    assert "DD-Mem (1)" in legend
    assert "undecided (2)" in legend


def test_far_values_do_not_squeeze_the_others_and_are_counted():
    theta, star, labels = estimates(300)
    theta.value[:2] = 1e6
    figure = dimension_figure(theta, star, labels)
    joint = max(figure.axes, key=lambda axes: axes.bbox.width * axes.bbox.height)
    assert joint.get_ylim()[1] < 100
    assert joint.get_title(loc="right") == "2 of 300 points lie outside"


def test_it_leaves_pyplot_and_the_style_alone(monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now fail
    before = {name: mpl.rcParams[name] for name in plotting.STYLE}
    dimension_figure(*estimates(20), images=np.zeros((20, 4, 4))).canvas.draw()
    assert {name: mpl.rcParams[name] for name in before} == before


def test_vectors_must_agree_and_hold_something_to_draw():
    theta, star, labels = estimates(10)
    with pytest.raises(ValueError, match=r"shape \(10,\).*labels of \(9,\).*same length"):
        dimension_figure(theta, star, labels[:9])
    nothing = Estimate(np.full(10, np.nan), theta.stderr)
    with pytest.raises(ValueError, match="no point at which both dimensions are finite"):
        dimension_figure(nothing, star, labels)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_a_grid_shows_every_image_in_order(shape):
    images = np.arange(7.0).reshape(7, *[1] * len(shape)) / 10 * np.ones(shape)
    figure = plotting.image_grid(images, labels=[f"n{i}" for i in range(7)], title="a title")
    shown = [axes.get_images()[0] for axes in figure.axes if axes.get_images()]
    assert [round(10 * float(np.ravel(image.get_array())[0])) for image in shown] == list(range(7))
    assert all(image.get_array().shape[:2] == (5, 4) for image in shown)
    assert all(image.get_clim() == (0, 1) for image in shown)
    assert len(figure.axes) == 9
    texts = [text for axes in figure.axes for text in axes.texts]
    assert [text.get_text() for text in texts] == [f"n{i}" for i in range(7)]
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes[:7]]
    for one, other in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(width, height) < 1
    for text in texts:
        assert figure.bbox.contains(
            text.get_window_extent().x0 + 1, text.get_window_extent().y0 + 1
        )


def test_a_grid_has_the_columns_asked_for_and_cuts_values_off():
    images = np.array([[[-3.0, 0.5]], [[2.0, np.nan]]])
    figure = plotting.image_grid(images, num_columns=1, labels=[1, 0.25])
    assert figure.axes[0].get_position().y0 > figure.axes[1].get_position().y1
    shown = [np.ravel(axes.get_images()[0].get_array()) for axes in figure.axes]
    np.testing.assert_array_equal(shown, [[0, 0.5], [1, 0]])


def test_what_is_no_set_of_images_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        plotting.image_grid(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4, 2\)"):
        plotting.image_grid(np.zeros((3, 4, 4, 2)))
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        plotting.image_grid(np.zeros((3, 4, 4)), labels=["a", "b"])
    with pytest.raises(ValueError, match="num_columns=0"):
        plotting.image_grid(np.zeros((3, 4, 4)), num_columns=0)


def loss_curve(num, shift):
    sigmas = np.geomspace(0.01, 10, 8)
    losses = 5 / (1 + sigmas) + shift + np.random.default_rng(num).normal(size=(num, 8))
    stderr = losses.std(axis=0, ddof=1) / np.sqrt(num)
    return evaluation.LossCurve(sigmas, losses, losses.mean(axis=0), stderr)


def test_the_loss_figure_shows_both_curves_and_their_gap():
    trained, held_out = loss_curve(1_200, 0.0), loss_curve(300, 0.5)
    figure = plotting.loss_figure(trained, held_out, title="a title")
    above, below = figure.axes
    drawn = [line.get_ydata() for line in above.lines]
    np.testing.assert_array_equal(drawn, [trained.value, held_out.value])
    np.testing.assert_array_equal(below.lines[0].get_ydata(), held_out.value - trained.value)
    band = below.collections[0].get_paths()[0].vertices[:, 1]
    gap = evaluation.loss_gap(trained, held_out)
    np.testing.assert_allclose(band.max(), (gap.value + 2 * gap.stderr).max())
    assert above.get_xscale() == "log"
    texts = visible_texts(figure)
    assert {"trained on (1,200)", "held out (300)"} <= {text for text, _ in texts}
    for text, box in texts:
        assert figure.bbox.contains(box.x0 + 1, box.y0 + 1), text
        assert figure.bbox.contains(box.x1 - 1, box.y1 - 1), text
    with pytest.raises(ValueError, match="over the same"):
        plotting.loss_figure(trained, held_out._replace(sigmas=held_out.sigmas + 1))


def test_samples_in_the_plane_are_counted_by_kind():
    samples = np.random.default_rng(0).normal(size=(9, 2))
    is_copy = np.arange(9) < 2
    figure = plotting.plane_figure(samples, is_copy, data=samples[:5])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["training data (5)", "samples (7)", "copies (2)"]
    shown = [np.asarray(group.get_offsets()) for group in figure.axes[0].collections]
    for found, expected in zip(shown, (samples[:5], samples[2:], samples[:2]), strict=True):
        np.testing.assert_array_equal(found, expected)
    alone = plotting.plane_figure(samples, np.zeros(9, bool))
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["samples (9)"]
    with pytest.raises(ValueError, match=r"have shapes \(9, 3\) and \(9,\); it takes"):
        plotting.plane_figure(np.zeros((9, 3)), is_copy)
