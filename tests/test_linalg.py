"""Traces and spectra against dense matrices; the promises about errors, memory and derivatives."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmh_jax import linalg, memorization
from mmh_jax.typing import Estimate, interval, variance_at

SHAPE = (3, 4, 2)
SIZE = 24


def random_matrix(seed=0, size=SIZE, dtype=jnp.float64):
    """No structure at all: not symmetric, eigenvalues of both signs."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(size, size)), dtype)


def symmetric(eigenvalues, seed=0, dtype=jnp.float64):
    eigenvalues = np.asarray(eigenvalues)
    normals = np.random.default_rng(seed).normal(size=2 * (len(eigenvalues),))
    basis = np.linalg.qr(normals)[0]
    return jnp.asarray(basis * eigenvalues @ basis.T, dtype)


def operator(matrix, shape=None):
    """`matrix` as a linear map on arrays of `shape`, and an example of such an array."""
    shape = matrix.shape[:1] if shape is None else shape

    def matvec(v):
        assert v.shape == shape
        product = jnp.matmul(matrix, v.reshape(-1), precision="highest")
        return product.reshape(shape)

    return matvec, jnp.zeros(shape, matrix.dtype)


def positive_part(matrix):
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    return eigenvalues[eigenvalues > 0].sum()


def over_keys(trace, matrix, count):
    """Values and standard errors for `count` keys."""
    matvec, like = operator(matrix)
    keys = jax.random.split(jax.random.key(7), count)
    found = jax.jit(jax.vmap(lambda key: trace(matvec, like, key=key)))(keys)
    return np.asarray(found.value), np.asarray(found.stderr)


def chi_squares(trace, matrix, count):
    matvec, like = operator(matrix)
    keys = jax.random.split(jax.random.key(7), count)
    return jax.jit(
        lambda keys: jax.lax.map(lambda key: trace(matvec, like, key=key), keys, batch_size=500)
    )(keys)


# Against dense matrices, on points that are not vectors; 24 is no multiple of 7, 11 and 100.


@pytest.mark.parametrize("chunk_size", [1, 7, 11, 24, 100])
def test_dense_float64(x64, chunk_size):
    matrix = random_matrix()
    matvec, like = operator(matrix, SHAPE)
    for trace, truth in (
        (linalg.exact(chunk_size), jnp.trace(matrix)),
        (linalg.xtrace(SIZE, chunk_size), jnp.trace(matrix)),
        (linalg.positive_exact(chunk_size), positive_part(matrix)),
    ):
        value, stderr = trace(matvec, like, key=jax.random.key(0))
        np.testing.assert_allclose(value, truth, rtol=1e-10)
        assert stderr == 0
        assert value.shape == stderr.shape == ()
    dense = linalg.jacobian(matvec, like, chunk_size=chunk_size)
    np.testing.assert_allclose(dense, matrix, rtol=1e-10)
    spectrum = linalg.jacobian_spectrum(matvec, like, chunk_size=chunk_size)
    truth = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
    np.testing.assert_allclose(spectrum, truth, rtol=1e-10, atol=1e-12)


def test_dense_float32():
    matrix = random_matrix(dtype=jnp.float32)
    matvec, like = operator(matrix, SHAPE)
    exact, positive = linalg.exact()(matvec, like), linalg.positive_exact()(matvec, like)
    assert exact.value.dtype == exact.stderr.dtype == positive.value.dtype == jnp.float32
    np.testing.assert_allclose(exact.value, jnp.trace(matrix), rtol=1e-5)
    np.testing.assert_allclose(positive.value, positive_part(matrix), rtol=1e-5)
    np.testing.assert_array_equal(linalg.jacobian(matvec, like), matrix)
    spectrum = linalg.jacobian_spectrum(matvec, like)
    truth = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
    np.testing.assert_allclose(spectrum, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [linalg.rademacher, linalg.xtrace])
def test_random_traces_do_not_depend_on_chunks_or_shape(x64, make):
    matrix, key = random_matrix(), jax.random.key(3)
    matvec, like = operator(matrix)
    truth = make(14)(matvec, like, key=key)
    for chunk_size in (1, 3, 5, 14, 50):
        for shape in ((SIZE,), SHAPE):
            result = make(14, chunk_size)(*operator(matrix, shape), key=key)
            if shape == SHAPE and make is linalg.rademacher:
                # Its probes are drawn in the shape of the point: the same signs, row by row.
                assert result.value.shape == ()
            np.testing.assert_allclose(result, truth, rtol=1e-10)


def test_rademacher_is_hutchinson_with_the_probes_of_its_keys(x64):
    matrix, key = random_matrix(), jax.random.key(3)
    value, stderr, dispersion = linalg.rademacher(10)(*operator(matrix), key=key)
    probes = [
        np.asarray(jax.random.rademacher(k, (SIZE,), jnp.float64))
        for k in jax.random.split(key, 10)
    ]
    forms = np.array([probe @ matrix @ probe for probe in probes])
    np.testing.assert_allclose(value, forms.mean(), rtol=1e-10)
    # How far a probe is from an eigenvector, and how that grows with its form.
    around = [
        np.sum((matrix @ probe - form / SIZE * probe) ** 2)
        for probe, form in zip(probes, forms, strict=True)
    ]
    np.testing.assert_allclose(stderr, np.sqrt(2 * np.mean(around) / 10), rtol=1e-10)
    slope = np.cov(forms, around)[0, 1] / forms.var(ddof=1)
    np.testing.assert_allclose(dispersion, 0.2 * np.clip(slope, 0, None), rtol=1e-10)
    assert jnp.isnan(linalg.rademacher(1)(*operator(matrix), key=key).stderr)


def test_rademacher_has_hutchinsons_variance(x64):
    matrix, num_probes = random_matrix(), 8
    values, errors = over_keys(linalg.rademacher(num_probes), matrix, 20_000)
    pairs = np.triu((matrix + matrix.T) / 2, 1)
    variance = 4 * np.sum(pairs**2) / num_probes
    # Both are within 4 of their own standard errors (kurtosis about 3: sqrt(2 / n) = 1%).
    np.testing.assert_allclose(values.var(), variance, rtol=0.04)
    assert abs(values.mean() - np.trace(matrix)) < 4 * np.sqrt(variance / values.size)
    # Twice the mean square of what is not along the probe; more than that, for asymmetry.
    around = np.sum(matrix**2) - (np.trace(matrix) ** 2 + num_probes * variance) / SIZE
    np.testing.assert_allclose(np.mean(errors**2), 2 * around / num_probes, rtol=0.04)


def rotated(eigenvalues, size=200, seed=11):
    """A positive operator in a random basis, and its trace."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, len(eigenvalues))))[0]
    return jnp.asarray((basis * np.asarray(eigenvalues)) @ basis.T), float(np.sum(eigenvalues))


@pytest.mark.parametrize("num_probes", [8, 16, 32])
@pytest.mark.parametrize("rank", [1, 2, 5, 10])
def test_the_interval_of_signs_is_right_at_small_rank(x64, rank, num_probes):
    """The form is a chi-square of `rank` degrees: value +- 1.96 stderr covers .85 at rank 1."""
    matrix, truth = rotated(np.ones(rank))
    found = chi_squares(linalg.rademacher(num_probes), matrix, 4_000)
    # For a projection the variance is known, given the trace: 2 t / K, but for t / D.
    factor = 2 / num_probes * (1 - rank / 200)
    np.testing.assert_allclose(variance_at(found, truth).mean(), factor * rank, rtol=0.02)
    low, high = interval(found)
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97
    judged = memorization.verdict(found, Estimate(truth, 0.001)).label
    assert np.mean(judged == memorization.Label.OD_MEM) <= 0.03


NOISE = np.random.default_rng(13).normal(size=(200, 200)) / 40  # of twice the norm of a projection


@pytest.mark.parametrize(
    "eigenvalues",
    [0.7 ** np.arange(20), 1 / np.arange(1, 101), [2.5, 1.2, 0.5], [1] + 100 * [0.01], None],
)
@pytest.mark.parametrize(
    "trace",
    [linalg.rademacher(8), linalg.rademacher(16), linalg.function_lanczos(lambda v: v, 8, 4)],
)
def test_the_interval_on_other_spectra(x64, trace, eigenvalues):
    if eigenvalues is None:  # a network's
        matrix, truth = rotated(np.ones(2))
        matrix += (NOISE + NOISE.T) / 2
        truth = np.trace(matrix)
    else:
        matrix, truth = rotated(eigenvalues, seed=12)
    found = chi_squares(trace, matrix, 2_000)
    low, high = interval(found)
    assert 0.925 <= np.mean((low <= truth) & (truth <= high)) <= 0.975  # 3 errors of the share


def test_a_diagonal_has_an_interval_of_a_dimension_or_so():
    """All forms are alike but for rounding, which is no slope."""
    found = chi_squares(
        linalg.rademacher(8), jnp.diag(jnp.append(jnp.full(3, 1 / 3), jnp.zeros(50))), 100
    )
    low, high = interval(found)
    assert np.all((low < 1) & (high > 1) & (high - low < 2))


def test_a_trace_of_zero_has_the_interval_of_zero(x64):
    found = linalg.rademacher(8)(lambda v: 0 * v, jnp.zeros(20), key=jax.random.key(0))
    assert interval(found) == (0, 0)
    assert memorization.verdict(found, Estimate(0.0, 0.01)).label == memorization.Label.DD_MEM


@pytest.mark.parametrize("probes", [linalg.rademacher(8), linalg.xtrace(12)])
def test_random_traces_are_unbiased(x64, probes):
    matrix = random_matrix()
    values, _ = over_keys(probes, matrix, 4_000)
    assert abs(values.mean() - np.trace(matrix)) < 4 * values.std() / np.sqrt(values.size)


# XTrace: leave-one-out by brute force, low rank, coverage.


def naive_xtrace(matrix, probes):
    """The paper's estimator as it defines it, one QR for each probe left out."""
    size, m = probes.shape
    values = []
    for i in range(m):
        basis = np.linalg.qr(matrix @ np.delete(probes, i, axis=1))[0]
        residual = probes[:, i] - basis @ (basis.T @ probes[:, i])
        form = residual @ matrix @ residual / (residual @ residual)
        values.append(np.trace(basis.T @ matrix @ basis) + (size - m + 1) * form)
    return np.array(values)


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_xtrace_is_the_mean_over_probes_left_out_in_turn(x64, is_symmetric):
    matrix, key = symmetric(0.9 ** np.arange(SIZE)), jax.random.key(5)
    if not is_symmetric:
        matrix += random_matrix(1) / 50
    probes = np.asarray(jax.random.normal(key, (6, SIZE), jnp.float64)).T
    probes = probes * np.sqrt(SIZE) / np.linalg.norm(probes, axis=0)
    value, stderr = linalg.xtrace(12)(*operator(matrix), key=key)
    naive = naive_xtrace(np.asarray(matrix), probes)
    np.testing.assert_allclose(value, naive.mean(), rtol=1e-10)
    textbook = naive.var(ddof=1) / 6
    change = np.zeros((6, 6))  # [i, j]: what leaving out probe j does to the estimate of probe i
    for i, j in itertools.permutations(range(6), 2):
        pair = naive_xtrace(np.asarray(matrix), np.delete(probes, j, axis=1))
        change[i, j] = naive[i] - pair[i - (j < i)]
    covariance = np.sum(change * change.T) / 30
    assert 0 < covariance < naive.var(ddof=1)  # the clipping is not in play
    student = 2.570582 / 1.959964
    np.testing.assert_allclose(stderr, student * np.sqrt(textbook + covariance), rtol=1e-6)


def test_xtrace_variance_is_unbiased_though_the_textbooks_is_not(x64):
    matrix = symmetric(np.append(np.ones(12), np.zeros(28)))
    values, errors = over_keys(linalg.xtrace(16), matrix, 20_000)
    student = 2.364624 / 1.959964  # 7 degrees of freedom
    ratio = np.mean(errors**2) / student**2 / values.var()
    assert 0.9 < ratio < 1.05  # s^2 / m alone gives .53


def test_products_of_xtrace_are_in_full_precision():
    """On accelerators the default is 8 or 10 bits, by which a deflated trace is lost."""
    matvec, like = (lambda v: 2 * v), jnp.zeros(40)
    program = jax.make_jaxpr(lambda key: linalg.xtrace(8)(matvec, like, key=key))(jax.random.key(0))
    text = str(program)
    assert text.count("dot_general") >= 10
    assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST")


def test_many_points_at_once_do_not_deadlock():
    """Two batched LAPACK calls at once hang jaxlib 0.10 on two cores: in a process of its own."""
    program = (
        "import jax, jax.numpy as jnp; from mmh_jax import linalg; "
        "matrix = jnp.diag(jnp.linspace(0, 1, 300)); trace = linalg.xtrace(60); "
        "at_key = lambda key: trace(lambda v: matrix @ v, jnp.zeros(300), key=key).value; "
        "print(jax.jit(jax.vmap(at_key))(jax.random.split(jax.random.key(0), 100)).mean())"
    )
    environment = dict(os.environ, XLA_FLAGS="")
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert abs(float(done.stdout) - 150) < 1


@pytest.mark.parametrize("num_products", [12, 18, 24, 32, 60])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_xtrace_on_low_rank(x64, dtype, num_products):
    rank, size = 10, 80
    keys = jax.random.split(jax.random.key(7), 60)
    trace = linalg.xtrace(num_products)
    run = jax.jit(lambda matrix: jax.vmap(lambda key: trace(*operator(matrix), key=key))(keys))
    for tail in (1e-3, 1e-6, 0.0):
        eigenvalues = np.append(np.linspace(1, 0.5, rank), np.full(size - rank, tail))
        matrix = symmetric(eigenvalues, dtype=dtype)
        truth = np.trace(np.asarray(matrix, np.float64))
        values, errors = (np.asarray(a) for a in run(matrix))
        assert values.dtype == errors.dtype == dtype
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(errors))
        assert np.all(errors > 0)
        misses = np.abs(values - truth)
        rounding = jnp.finfo(dtype).eps * truth * np.sqrt(size)
        if num_products >= 2 * rank + 4:
            # The largest of 60 may be 100 tails: XTrace is heavy-tailed just above the rank.
            assert np.median(misses) < tail + rounding
            assert misses.max() < 200 * tail + rounding
        else:
            assert np.median(misses) < 1.5
        assert np.mean(misses < 1.96 * errors) > 0.8
        assert np.median(errors) < (3 * tail + 2 * rounding if num_products >= 24 else 3)


def test_xtrace_of_nothing_and_of_a_multiple_of_the_identity():
    matvec, like = operator(jnp.zeros((40, 40)))
    value, stderr = linalg.xtrace(8)(matvec, like, key=jax.random.key(0))
    assert value == stderr == 0
    value, _ = linalg.xtrace(8)(lambda v: 2 * v, like, key=jax.random.key(0))
    np.testing.assert_allclose(value, 80, rtol=1e-5)


@pytest.mark.parametrize("trace", [linalg.rademacher(16), linalg.xtrace(16), linalg.xtrace(40)])
def test_intervals_cover_the_truth(x64, trace):
    spectrum = 1 / (1 + np.geomspace(0.02, 50, 60))  # a linear Gaussian's, variances over decades
    matrix = symmetric(spectrum)
    values, errors = over_keys(trace, matrix, 2_000)
    assert 0.93 <= np.mean(np.abs(values - spectrum.sum()) < 1.96 * errors) <= 0.97


# Derivatives, vmap, jit, memory.


def deformed(t, eigenvalues):
    """A symmetric family, eigenvalues degenerate and of both signs at t = 0, nearby not so."""
    base = symmetric(eigenvalues, seed=1)
    direction = random_matrix(2, len(eigenvalues))
    return base + t * (direction + direction.T)


@pytest.mark.parametrize("eigenvalues", [[1, 1, 1, 0.5, 0.5, -1, -1], [2.0] * 4, [-1, -1, 3]])
@pytest.mark.parametrize(
    "make",
    [
        linalg.exact,
        linalg.positive_exact,
        lambda size: linalg.positive_exact(size, above_noise=True),
    ],
)
def test_derivative_with_degenerate_eigenvalues(x64, make, eigenvalues):
    def value(t):
        return make(3)(*operator(deformed(t, eigenvalues))).value

    step = 1e-5
    difference = (value(step) - value(-step)) / (2 * step)
    for derivative in (jax.grad(value)(0.0), jax.jacfwd(value)(0.0), jax.jit(jax.grad(value))(0.0)):
        np.testing.assert_allclose(derivative, difference, rtol=1e-7)
    second = jax.grad(jax.grad(lambda t: value(t**2)))(0.0)
    np.testing.assert_allclose(second, 2 * difference, rtol=1e-6)


@pytest.mark.parametrize("above_noise", [False, True])
def test_second_derivative_of_positive_exact_moves_the_projector(x64, above_noise):
    """Eigenvalues exactly equal (no rounding parts them), those of the other sign at some distance.

    d^2/dt^2 sum = 2 sum_ij |e_i . E e_j|^2 / (l_i - l_j), i kept and j not.
    """
    eigenvalues = jnp.array([2.0, 2.0, 2.0, -1.0, -1.0, -0.5])
    direction = random_matrix(3, 6)
    direction = direction + direction.T

    def value(t):
        matrix = jnp.diag(eigenvalues) + t * direction
        return linalg.positive_exact(4, above_noise=above_noise)(*operator(matrix)).value

    gaps = eigenvalues[:3, None] - eigenvalues[None, 3:]
    expected = 2 * jnp.sum(direction[:3, 3:] ** 2 / gaps)
    for second in (
        jax.grad(jax.grad(value)),
        jax.jacfwd(jax.grad(value)),
        jax.jit(jax.hessian(value)),
    ):
        np.testing.assert_allclose(second(0.0), expected, rtol=1e-12)


def test_positive_exact_of_a_network_that_is_nan():
    for above_noise in (False, True):
        trace = linalg.positive_exact(4, above_noise=above_noise)
        assert np.isnan(trace(*operator(jnp.full((4, 4), jnp.nan))).value)


def test_gradient_of_positive_exact_is_the_projector(x64):
    matrix = symmetric([1, 1, 1, -2, -2, -2])
    gradient = jax.grad(lambda m: linalg.positive_exact()(*operator(m)).value)(matrix)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    kept = vectors[:, eigenvalues > 0]
    np.testing.assert_allclose(gradient, kept @ kept.T, atol=1e-12)


@pytest.mark.parametrize("trace", [linalg.rademacher(6), linalg.xtrace(6), linalg.xtrace(16)])
@pytest.mark.parametrize("rank", [2, SIZE])
def test_derivative_of_random_traces(x64, trace, rank):
    base = symmetric(np.append(np.ones(rank), np.zeros(SIZE - rank)))
    matrix = jnp.outer(jnp.arange(1.0, SIZE + 1), jnp.ones(SIZE)) / SIZE

    def slope(key):
        def value(t):
            return trace(*operator(base + t * (base + jnp.diag(matrix[:, 0]))), key=key).value

        return jax.grad(value)(0.0)

    slopes = np.asarray(jax.jit(jax.vmap(slope))(jax.random.split(jax.random.key(0), 2_000)))
    truth = rank + np.trace(matrix)
    assert np.all(np.isfinite(slopes))
    assert abs(slopes.mean() - truth) < 4 * slopes.std() / np.sqrt(slopes.size) + 1e-9


@pytest.mark.parametrize("trace", [linalg.rademacher(6), linalg.xtrace(6)])
def test_derivative_of_the_value_where_there_is_no_spread(trace):
    """The loop hands the standard error a cotangent of zero, which times infinity would be NaN."""

    def value(scale):
        def at_key(key):
            return trace(lambda v: scale * v, jnp.zeros(SIZE), key=key)

        return jax.lax.map(at_key, jax.random.split(jax.random.key(0), 3)).value.sum()

    for scale in (0.0, 2.0):
        np.testing.assert_allclose(jax.grad(value)(scale), 3 * SIZE, rtol=1e-4)


@pytest.mark.parametrize(
    "trace", [linalg.exact(5), linalg.positive_exact(5), linalg.rademacher(6), linalg.xtrace(8)]
)
def test_vmap_over_points_and_jit(x64, trace):
    matrix = random_matrix(size=12)

    def at_point(x, key):
        _, matvec = jax.linearize(lambda y: jnp.tanh(matrix @ y), x)
        return trace(matvec, x, key=key)

    points = random_matrix(4, 12)[:5] / 10
    keys = jax.random.split(jax.random.key(1), 5)
    batch = jax.jit(jax.vmap(at_point))(points, keys)
    loop = [at_point(x, key) for x, key in zip(points, keys, strict=True)]
    np.testing.assert_allclose(batch, np.array(loop).T, rtol=1e-9)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_does_not_grow_with_the_number_of_probes(backward):
    size, width = 1_000, 20_000

    def temporary_bytes(trace):
        def value(weights, key):
            def matvec(v):
                hidden = jnp.sin(jnp.tile(v, width // size) * weights)
                return hidden.reshape(-1, size).sum(0)

            return trace(matvec, jnp.zeros(size), key=key).value

        function = jax.grad(value) if backward else value
        compiled = jax.jit(function).lower(jnp.ones(width), jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(linalg.rademacher(16)), temporary_bytes(linalg.rademacher(512))
    assert few > 16 * 4 * size  # the probes of one chunk at least: the figure is not empty
    assert many < 1.1 * few + 256 * 512  # keys and results; one probe's tangent is 80,000 bytes


def test_number_of_products(x64):
    matrix = random_matrix()

    def products(trace):
        count = 0

        def counted(_):
            nonlocal count
            count += 1

        def matvec(v):
            jax.debug.callback(counted, v[0])
            return matrix @ v

        jax.jit(lambda key: trace(matvec, jnp.zeros(SIZE), key=key))(jax.random.key(0))
        jax.effects_barrier()
        return count

    assert products(linalg.exact(8)) == SIZE
    assert products(linalg.positive_exact(8)) == SIZE
    assert products(linalg.rademacher(10, 5)) == 10
    assert products(linalg.xtrace(10, 5)) == 10
    assert products(linalg.xtrace(11, 5)) == 10


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), positive=st.integers(0, 9))
def test_spectrum_is_invariant_under_rotation(seed, positive):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        eigenvalues = np.append(rng.uniform(0, 2, positive), rng.uniform(-2, 0, 9 - positive))
        skew = random_matrix(seed + 1, 9)
        matrix = symmetric(eigenvalues, seed) + skew - skew.T
        rotation = np.linalg.qr(random_matrix(seed + 2, 9))[0]
        spectrum = linalg.jacobian_spectrum(*operator(matrix), chunk_size=4)
        turned = linalg.jacobian_spectrum(*operator(rotation @ matrix @ rotation.T), chunk_size=4)
        np.testing.assert_allclose(spectrum, turned, atol=1e-12)
        np.testing.assert_allclose(spectrum, np.sort(eigenvalues)[::-1], atol=1e-12)


# The boundary.


@pytest.mark.parametrize("trace", [linalg.rademacher(4), linalg.xtrace(4)])
def test_key_is_required_and_typed(trace):
    matvec, like = operator(jnp.eye(SIZE))
    with pytest.raises(TypeError, match=r"needs a key: pass `key=jax\.random\.key\(0\)`"):
        trace(matvec, like)
    with pytest.raises(TypeError, match=r"not a typed key; make one with `jax\.random\.key"):
        trace(matvec, like, key=jax.random.PRNGKey(0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: linalg.exact(0), r"exact\(chunk_size=0\).*at least 1"),
        (lambda: linalg.rademacher(0), r"rademacher\(num_probes=0\)"),
        (lambda: linalg.rademacher(2.0), r"rademacher\(num_probes=2.0\).*integer"),
        (lambda: linalg.rademacher(4, True), r"rademacher\(chunk_size=True\).*integer"),
        (lambda: linalg.xtrace(3), r"xtrace\(num_products=3\).*at least 4"),
        (lambda: linalg.xtrace(4, -1), r"xtrace\(chunk_size=-1\)"),
        (lambda: linalg.positive_exact(0), r"positive_exact\(chunk_size=0\)"),
        (lambda: linalg.jacobian(jnp.sin, jnp.zeros(2), chunk_size=0), r"jacobian\(chunk_size=0\)"),
    ],
)
def test_sizes_are_checked(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_strategies_are_values():
    assert linalg.rademacher(4) == linalg.rademacher(4) != linalg.rademacher(5)
    assert hash(linalg.xtrace(8)) == hash(linalg.xtrace(8))
    assert linalg.exact() == linalg.exact(32) != linalg.positive_exact(32)


@pytest.mark.parametrize("num_products", [12, 24])
def test_xtrace_is_matfrees_for_the_same_probes(x64, num_products):
    """The value only: matfree's standard error takes the leave-one-out estimates as independent."""
    stochtrace = pytest.importorskip("matfree.stochtrace")
    rng = np.random.default_rng(0)
    size, key = 60, jax.random.key(3)
    matrix = jnp.asarray(rng.normal(size=(size, size)) @ np.diag(0.8 ** np.arange(size)))
    probes = jax.random.normal(key, (num_products // 2, size))
    probes *= jnp.sqrt(size) / jnp.linalg.norm(probes, axis=1, keepdims=True)
    reference = stochtrace.leave_one_out_xtrace()(lambda v: matrix @ v, probes).mean()
    ours = linalg.xtrace(num_products)(lambda v: matrix @ v, jnp.zeros(size), key=key)
    np.testing.assert_allclose(ours.value, reference, rtol=1e-9)


# Hutch++, and functions of the spectrum by Lanczos quadrature.


def test_hutchpp_is_unbiased_and_its_errors_cover(x64):
    matrix = symmetric(0.9 ** np.arange(100))
    values, errors = over_keys(linalg.hutchpp(48), matrix, 2000)
    truth = float(jnp.trace(matrix))
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(values.size)
    assert 0.92 < np.mean(np.abs(values - truth) < 1.96 * errors) < 0.97
    plain, _ = over_keys(linalg.rademacher(48), matrix, 2000)
    assert values.std() < plain.std() / 1.5


def test_hutchpp_of_low_rank_is_exact_and_of_many_products_too(x64):
    matrix = symmetric([2.0, 1.0, 0.5] + 37 * [0.0])
    matvec, like = operator(matrix)
    value, stderr = linalg.hutchpp(12)(matvec, like, key=jax.random.key(0))
    np.testing.assert_allclose(value, 3.5, rtol=1e-10)
    assert stderr < 1e-10
    value, stderr = linalg.hutchpp(40)(matvec, like, key=jax.random.key(0))
    np.testing.assert_allclose(value, 3.5, rtol=1e-10)
    assert stderr == 0
    with pytest.raises(ValueError, match="at least 6"):
        linalg.hutchpp(5)


def test_lanczos_is_exact_when_the_order_reaches_the_number_of_eigenvalues(x64):
    # Three different eigenvalues, one of them negative; a probe sees each of them.
    matrix = symmetric(10 * [1.0] + 20 * [0.0] + 10 * [-0.3])
    matvec, like = operator(matrix, (4, 10))
    keys = jax.random.split(jax.random.key(1), 500)
    for order in (3, 4, 24):  # 4 and more: the Krylov space is exhausted on the way
        trace = linalg.positive_lanczos(1, order)
        values = jax.jit(jax.vmap(lambda key, t=trace: t(matvec, like, key=key).value))(keys)
        assert abs(values.mean() - 10) < 4 * values.std() / np.sqrt(500)
        # With one probe v the value is |P v|^2, P the projection on the positive eigenspace.
        signs = jax.vmap(
            lambda key: jax.random.rademacher(jax.random.split(key, 1)[0], (40,), float)
        )(keys)
        projected = (signs @ (matrix @ (matrix + 0.3 * np.eye(40)) / 1.3)) @ signs.T
        np.testing.assert_allclose(values, jnp.diag(projected), rtol=1e-8)


def test_lanczos_symmetrises_and_breaks_down_gracefully(x64):
    skew = random_matrix(3)
    skew = skew - skew.T
    matvec, like = operator(jnp.diag(jnp.arange(24.0) < 5) + skew)
    value, *_ = linalg.positive_lanczos(8, 10)(matvec, like, key=jax.random.key(0))
    np.testing.assert_allclose(value, 5, rtol=1e-8)  # a diagonal has no variance
    zero, stderr, _ = linalg.positive_lanczos(4, 10)(lambda v: 0 * v, like, key=jax.random.key(0))
    assert zero == 0
    assert stderr == 0
    broken = linalg.positive_lanczos(4, 5)(lambda v: jnp.nan * v, like, key=jax.random.key(0))
    assert jnp.isnan(broken.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_lanczos_on_a_noisy_spectrum_matches_the_dense_one(x64, dtype):
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(200, 200)) * 0.1 / np.sqrt(200)
    matrix = symmetric(20 * [0.95] + 180 * [0.0]) + noise + noise.T
    truth = positive_part(matrix)
    matvec, like = operator(jnp.asarray(matrix, dtype))
    value, stderr, _ = linalg.positive_lanczos(200, 24)(matvec, like, key=jax.random.key(2))
    assert value.dtype == dtype
    assert abs(value - truth) < 3 * stderr + 0.01 * truth
    assert 0.2 < stderr < 1


def test_lanczos_of_a_function_and_its_derivative(x64):
    matrix = symmetric(np.linspace(0.1, 1, 24))
    matvec, like = operator(matrix)
    trace = linalg.function_lanczos(jnp.exp, 50, 12)
    value, stderr, _ = trace(matvec, like, key=jax.random.key(0))
    truth = np.exp(np.linspace(0.1, 1, 24)).sum()
    assert abs(value - truth) < 3 * stderr

    def scaled(factor):
        return trace(lambda v: factor * matvec(v), like, key=jax.random.key(0)).value

    step = 1e-6
    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(scaled)(1.0), slope, rtol=1e-5)


def test_lanczos_is_matfrees_where_nothing_breaks_down(x64):
    decomp = pytest.importorskip("matfree.decomp")
    matvec, like = operator(symmetric(np.linspace(-1, 1, 24)))
    key = jax.random.key(3)
    value, *_ = linalg.function_lanczos(jnp.cos, 1, 8)(matvec, like, key=key)
    probe = jax.random.rademacher(jax.random.split(key, 1)[0], (24,), float)
    dense = decomp.tridiag_sym(8, custom_vjp=False)(matvec, probe)[1]
    nodes, vectors = np.linalg.eigh(dense)
    np.testing.assert_allclose(value, 24 * np.sum(vectors[0] ** 2 * np.cos(nodes)), rtol=1e-9)


def test_lanczos_survives_a_projection_in_float32():
    matvec, like = operator(symmetric(10 * [1.0] + 90 * [0.0], dtype=jnp.float32))
    # f(0) = 1 and f(1) = 3: a rule spoiled after the breakdown is far off.
    trace = linalg.function_lanczos(lambda v: 1 + 2 * jnp.abs(v), 400, 12)
    value, stderr, _ = trace(matvec, like, key=jax.random.key(0))
    assert abs(value - 120) < 3 * stderr
    assert stderr < 0.6


def test_above_noise_removes_rectified_noise_and_leaves_exact_denoisers(x64):
    rng = np.random.default_rng(8)
    noise = rng.normal(size=(200, 200)) * 0.1 / np.sqrt(200)
    exact = symmetric(20 * [0.95] + 180 * [0.0])
    noisy = exact + (noise + noise.T) / np.sqrt(2)
    rectified = linalg.positive_exact()(*operator(noisy)).value
    kept = linalg.positive_exact(above_noise=True)(*operator(noisy)).value
    edge = -float(np.linalg.eigvalsh(noisy)[0])
    np.testing.assert_allclose(edge, 0.2, rtol=0.1)  # the semicircle's
    # 180 directions of semicircle noise, rectified; and what noise does to 20 large eigenvalues.
    np.testing.assert_allclose(rectified - kept, 180 * 2 * edge / (3 * np.pi), rtol=0.15)
    np.testing.assert_allclose(kept, 19 + 20 * edge**2 / (4 * 0.95), rtol=0.01)
    for trace in (linalg.positive_exact(above_noise=True), linalg.positive_exact()):
        np.testing.assert_allclose(trace(*operator(exact)).value, 19, rtol=1e-10)
    lanczos = linalg.positive_lanczos(200, 24, above_noise=True)
    value, stderr, _ = lanczos(*operator(noisy), key=jax.random.key(0))
    assert abs(value - kept) < 3 * stderr + 0.01 * kept


def test_the_noise_edge_is_no_artefact_of_lanczos():
    # Orthogonalised only once, the vectors after the breakdown give nodes of -30 in float32.
    matvec, like = operator(symmetric(10 * [1.0] + 290 * [0.0], dtype=jnp.float32))
    key = jax.random.key(0)
    kept = linalg.positive_lanczos(64, 40, above_noise=True)(matvec, like, key=key)
    plain = linalg.positive_lanczos(64, 40)(matvec, like, key=key)
    assert abs(plain.value - 10) < 3 * plain.stderr
    np.testing.assert_allclose(kept.value, plain.value, rtol=1e-4)


@pytest.mark.parametrize("order", [5, 8, 24])
@pytest.mark.parametrize("above_noise", [False, True])
def test_derivative_of_lanczos_after_the_last_step(order, above_noise):
    # 3 different eigenvalues in R^40: exhausted after 3 or 4 steps, as with an exact denoiser.
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (40, 3)))[0]
    trace = linalg.positive_lanczos(4, order, above_noise=above_noise)

    def value(scale):
        gains = jnp.array([0.9, 0.6, 0.3]) * scale
        return trace(
            lambda v: basis @ (gains * (basis.T @ v)), jnp.zeros(40), key=jax.random.key(1)
        ).value

    # Linear in the scale.
    np.testing.assert_allclose(jax.grad(value)(1.0), value(1.0), rtol=1e-4)
