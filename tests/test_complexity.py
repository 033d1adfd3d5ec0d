"""Complexity against Pillow and NumPy, and what a conformal p-value promises."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from mmh_jax.memorization import (
    complexity_residual,
    conformal_p,
    lid_per_bit,
    png_bytes,
    total_variation,
    zlib_bytes,
)


def size_by_pillow(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.tell()


@pytest.mark.parametrize("shape", [(12, 9), (12, 9, 1), (12, 9, 3)])
def test_png_bytes_are_pillows(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (5, *shape), np.uint8)
    pixels[0] = 7
    expected = [size_by_pillow(image[..., 0] if shape[2:] == (1,) else image) for image in pixels]
    np.testing.assert_array_equal(png_bytes(pixels), expected)
    np.testing.assert_array_equal(png_bytes(pixels / 255), expected)
    np.testing.assert_array_equal(png_bytes(pixels / 127.5 - 1, low=-1, high=1), expected)
    assert np.all(np.argmin(expected) == 0)


def test_bytes_are_bounded_by_the_content():
    images = np.random.default_rng(0).uniform(size=(4, 20, 20))
    np.testing.assert_array_equal(png_bytes(images * 3), png_bytes(np.minimum(images * 3, 1)))
    points = np.random.default_rng(0).uniform(size=(3, 50))
    expected = [len(zlib.compress(np.round(255 * p).astype(np.uint8).tobytes(), 9)) for p in points]
    np.testing.assert_array_equal(zlib_bytes(points), expected)


def test_total_variation_sees_edges():
    image = np.zeros((1, 6, 6))
    image[0, 2:4, 2:4] = 0.5
    assert total_variation(image)[0] == pytest.approx(0.5 * 8)  # the outline of the square
    colour = np.repeat(image[..., None], 3, axis=3)
    assert total_variation(colour)[0] == pytest.approx(0.5 * 8 * 3)
    assert total_variation(image + 5)[0] == pytest.approx(0.5 * 8)


def test_lid_per_bit():
    np.testing.assert_allclose(lid_per_bit([8.0, 16.0], [1, 4]), [1.0, 0.5])
    with pytest.raises(ValueError, match="positive"):
        lid_per_bit([1.0], [0])


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_residual_is_polyfits(degree):
    rng = np.random.default_rng(0)
    size = rng.uniform(100, 200, 60)
    known = 0.1 * size + 0.001 * (size - 150) ** 2 + rng.normal(size=60)
    lid, complexity = rng.normal(15, 3, 20), rng.uniform(size.min(), size.max(), 20)
    coefficients = np.polyfit(size, known, degree)
    left = known - np.polyval(coefficients, size)
    spread = np.sqrt(np.sum(left**2) / (60 - degree - 1))
    expected = (lid - np.polyval(coefficients, complexity)) / spread
    found = complexity_residual(lid, complexity, known, size, degree=degree)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_residual_at_the_ends():
    size = np.arange(20.0)
    known = size + np.tile([0.5, -0.5], 10)
    inside, beyond = complexity_residual([5.0, 5.0], [19.0, 400.0], known, size, degree=3)
    assert inside == pytest.approx(beyond)  # continued as a constant
    exact = complexity_residual([3.0, 2.0, np.nan], [3.0, 3.0, 3.0], size, size)
    np.testing.assert_array_equal(exact, [0, -np.inf, np.nan])
    # One complexity for all: the mean, whatever the degree.
    same = complexity_residual([2.0], [1.0], [0.0, 2.0, 4.0, 6.0], np.ones(4), degree=1)
    assert same[0] == pytest.approx((2 - 3) / np.std([0, 2, 4, 6], ddof=1))


def draws(rng, num, *, tied):
    """LID that depends on complexity, in its spread too."""
    complexity = rng.gamma(3.0, size=num)
    lid = 5 * complexity + (1 + complexity) * rng.normal(size=num)
    return (np.round(lid / 4), np.round(complexity)) if tied else (lid, complexity)


@pytest.mark.parametrize("tied", [False, True])
def test_p_values_are_valid_in_all_and_in_each_bin(tied):
    rng, repeats = np.random.default_rng(0), 5000
    p_values, complexities = np.empty(repeats), np.empty(repeats)
    for repeat in range(repeats):
        known, size = draws(rng, 60, tied=tied)
        lid, complexity = draws(rng, 1, tied=tied)
        p_values[repeat] = conformal_p(lid, complexity, known, size, num_bins=3)[0]
        complexities[repeat] = np.sum(size < complexity[0])
    # The bins, as the ranks among a reference of 60 tell them.
    bins = 3 * complexities // 61
    groups = [np.ones(repeats, bool), *(bins == number for number in range(3))]
    for group in groups:
        assert group.sum() > 500
        for level in (0.05, 0.1, 0.3, 0.5):
            error = np.sqrt(level * (1 - level) / group.sum())
            rate = np.mean(p_values[group] <= level)
            assert rate <= level + 3.5 * error
            if not tied:  # not valid by being useless: at most one part in a bin of 21 lower
                assert rate >= level - 1 / 19 - 3.5 * error


@pytest.mark.parametrize("tied", [False, True])
def test_p_values_are_their_definition(tied):
    """The point is put among the reference, and all are divided by rank, alike."""
    rng = np.random.default_rng(0)
    (known, size), (lid, complexity) = draws(rng, 47, tied=tied), draws(rng, 40, tied=tied)
    expected = []
    for value, own in zip(lid, complexity, strict=True):
        every, values = np.append(size, own), np.append(known, value)
        rank = np.array([np.sum(every < each) for each in every])
        inside = 4 * rank // 48 == 4 * rank[-1] // 48
        expected.append(np.mean(values[inside] <= value))
    np.testing.assert_allclose(conformal_p(lid, complexity, known, size, num_bins=4), expected)


def test_p_values_see_what_is_low_for_its_complexity():
    rng = np.random.default_rng(0)
    known, size = draws(rng, 500, tied=False)
    # A LID of 4 is usual where complexity is 1, and far too low where it is 6.
    simple, low, nothing, nowhere = conformal_p(
        [4.0, 4.0, np.nan, 4.0], [1.0, 6.0, 6.0, np.nan], known, size
    )
    assert simple > 0.2
    assert low < 0.03
    assert np.isnan(nothing)
    assert np.isnan(nowhere)
    # Without complexity the two are one.
    first, second = conformal_p([4.0, 4.0], [1.0, 6.0], known, size, num_bins=1)
    assert first == second == (1 + np.sum(known <= 4)) / 501


def test_p_values_do_not_depend_on_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    reference, some = draws(rng, 100, tied=False), draws(rng, 30, tied=False)
    whole = conformal_p(*some, *reference)
    monkeypatch.setattr("mmh_jax.memorization.complexity._CHUNK", 500)
    np.testing.assert_array_equal(conformal_p(*some, *reference), whole)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: png_bytes(np.zeros((2, 5))), ValueError, "zlib_bytes"),
        (lambda: png_bytes(np.zeros((2, 5, 5), int)), TypeError, "real numbers or bytes"),
        (lambda: png_bytes(np.zeros((2, 5, 5)), low=1), ValueError, "below white"),
        (lambda: zlib_bytes(np.array([[0.0], [np.nan]])), ValueError, "1 of 2 points"),
        (lambda: zlib_bytes(np.zeros(3)), ValueError, "several points"),
        (lambda: total_variation(np.zeros((2, 5))), ValueError, "takes"),
        (
            lambda: complexity_residual([1.0], [1.0], [1.0, 2.0], [1.0, 2.0]),
            ValueError,
            "more than",
        ),
        (lambda: complexity_residual([1.0], [1.0, 2.0], [1.0], [1.0]), ValueError, "one number"),
        (lambda: conformal_p([1.0], [1.0], np.ones(49), np.ones(49)), ValueError, "ten reference"),
        (lambda: conformal_p([1.0], [1.0], [np.nan] * 50, np.ones(50)), ValueError, "not finite"),
    ],
)
def test_what_is_wrong_is_said(call, error, match):
    with pytest.raises(error, match=match):
        call()
