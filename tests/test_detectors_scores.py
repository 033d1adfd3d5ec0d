"""Detectors by name: they order memory on an exact model, share what they cost, and keep NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from scipy.stats import spearmanr

from mmh_jax import denoise, lid, linalg, nn, noise, sample
from mmh_jax import memorization as mem
from mmh_jax.analytic import Empirical, LinearGaussian, Mixture
from mmh_jax.memorization.evidence import gather
from mmh_jax.memorization.scoring import _kept_program
from mmh_jax.memorization.subject import At
from mmh_jax.typing import Estimate

RNG = np.random.default_rng(0)
AMBIENT, DIM, NUM, SIGMA = 16, 12, 8, 0.1
KEY = jax.random.key(0)
BASIS = np.linalg.qr(RNG.normal(size=(AMBIENT, DIM)))[0]
SCALES = np.geomspace(0.15, 3.0, DIM)
TRAINED = SCALES * RNG.normal(size=(NUM, DIM))
WHICH, NORMALS = RNG.integers(0, NUM, 24), RNG.normal(size=(24, DIM))
LEVELS = sample.karras_levels(12, sigma_min=SIGMA, sigma_max=20.0)
SETTINGS = mem.Settings(
    SIGMA,
    levels=LEVELS,
    encode_levels=np.geomspace(0.1, 1.0, 12),
    tiles=1,
    regeneration_levels=np.geomspace(SIGMA, SIGMA / 20, 8),
)


@struct.dataclass
class Memory:
    """The exact denoiser of a model that has memorized its NUM points to a degree kappa.

    Components N(sqrt(kappa) x_i, (1 - kappa) Sigma), on a subspace of dimension DIM: at kappa = 0
    the population N(0, Sigma), at 1 the points, and about the same total variance in between.
    """

    kappa: float

    def __call__(self, x, sigma):
        basis, points = jnp.asarray(BASIS, x.dtype), jnp.asarray(TRAINED, x.dtype)
        y = basis.T @ x
        totals = (1 - self.kappa) * jnp.asarray(SCALES, x.dtype) ** 2 + sigma**2
        away = y - jnp.sqrt(self.kappa) * points
        shares = jax.nn.softmax(-jnp.sum(away**2 / totals, axis=1) / 2)
        return basis @ (y - shares @ (sigma**2 / totals * away))


def samples_of(kappa):
    """Of the model, with the same random numbers at each kappa."""
    y = np.sqrt(kappa) * TRAINED[WHICH] + np.sqrt(1 - kappa) * SCALES * NORMALS
    return (y @ BASIS.T).astype(np.float32)


def subject_of(kappa, **more):
    return mem.Subject(
        samples_of(kappa), Memory(kappa), unconditional=Memory(0.0), baseline=Memory(0.0), **more
    )


def test_the_memory_model_is_a_mixture(x64):
    kappa = 0.7
    parts = [
        LinearGaussian(np.sqrt(kappa) * BASIS @ point, BASIS, np.sqrt(1 - kappa) * SCALES)
        for point in TRAINED
    ]
    x = BASIS @ (SCALES * RNG.normal(size=DIM)) + 0.0
    found = Memory(kappa)(jnp.asarray(x), SIGMA)
    np.testing.assert_allclose(found, Mixture(parts, np.ones(NUM))(x, SIGMA), rtol=1e-9, atol=1e-9)


LID_DETECTORS = (
    "flipd",
    "projected_flipd",
    "thresholded_flipd",
    "tangential_flipd",
    "expected_flipd",
    "projected_trace",
    "eigenvalue_count",
    "soft_count",
    "normal_bundle",
    "denoising_loss",
    "denoised_spread",
    "denoised_mean",
    "regeneration",
    "regeneration_spread",
    "regeneration_mean",
    "denoised_spread_log_ratio_baseline",
    "denoised_mean_log_ratio_baseline",
    "regeneration_log_ratio_baseline",
    "regeneration_spread_log_ratio_baseline",
    "regeneration_mean_log_ratio_baseline",
    "flipd_difference",
    "flipd_log_ratio",
    "projected_trace_difference",
    "projected_trace_log_ratio",
    "eigenvalue_count_difference",
    "projected_trace_log_ratio_baseline",
    "curvature_difference",
    "curvature_difference_baseline",
)
# What else separates a conditional model that has memorized from one that has not.
OTHERS = (
    "score_norm",
    "cfg_norm",
    "cfg_norm_first",
    "cfg_norm_along",
    "cfg_norm_encoded",
    "sharpness",
    "anisotropy",
    "squared_difference",
)


@pytest.fixture(scope="module")
def dose_response():
    """Mean scores at eight degrees of memory, by detector."""
    kappas = 1 - np.geomspace(1.0, 1e-3, 8)
    found = [
        mem.scores([*LID_DETECTORS, *OTHERS], subject_of(kappa), SETTINGS, key=KEY)
        for kappa in kappas
    ]
    return kappas, {
        name: np.array([each.value[name].mean() for each in found]) for name in found[0].value
    }


@pytest.mark.slow  # by default: `benchmarks/memorization.py`, which asks for the same
@pytest.mark.parametrize("name", LID_DETECTORS)
def test_dimensions_order_the_degree_of_memory(dose_response, name):
    kappas, means = dose_response
    correlation = spearmanr(kappas, means[name]).statistic
    assert correlation >= 0.99, means[name]


@pytest.mark.slow  # by default: `benchmarks/memorization.py`, which asks for the same
@pytest.mark.parametrize("name", OTHERS)
def test_a_memorized_condition_scores_higher(dose_response, name):
    _, means = dose_response
    assert means[name][-1] > means[name][0]
    assert np.all(np.isfinite(means[name]))


SPECTRAL = [
    "projected_flipd",
    "thresholded_flipd",
    "tangential_flipd",
    "expected_flipd",
    "projected_trace",
    "eigenvalue_count",
]


def test_every_score_is_the_function_at_the_point():
    """With the pair in its order; what reads the spectrum costs one spectrum."""
    subject = subject_of(0.9)
    names = [*SPECTRAL, "cfg_norm_encoded", "squared_difference", "flipd_difference", "residual"]
    found = mem.scores(names, subject, SETTINGS, key=KEY)
    model, null = subject.denoiser, subject.unconditional

    @jax.jit
    @jax.vmap
    def alone(x):
        spectrum = lid.jacobian_spectrum(model, x, SIGMA)
        return spectrum, {
            "projected_trace": -jnp.maximum(spectrum.eigenvalues, 0).sum(),
            "eigenvalue_count": -lid.rank_by_threshold(spectrum.eigenvalues),
            "residual": -jnp.sqrt(spectrum.residual),
            "cfg_norm_encoded": mem.encoded_cfg_norm(model, null, x, SETTINGS.encode_levels),
            "squared_difference": mem.cfg_norm(model, null, x, SIGMA) ** 2,
            "flipd_difference": lid.flipd(null, x, SIGMA).value - lid.flipd(model, x, SIGMA).value,
        }

    spectra, expected = alone(subject.points)
    expected |= {name: -getattr(spectra, name) for name in SPECTRAL[:4]}
    for name, value in expected.items():
        np.testing.assert_allclose(found.value[name], value, rtol=2e-4, atol=1e-5)
    assert found.total == (1 + AMBIENT) + (2 * 12 + 1) + 2 + 2 * (1 + AMBIENT) + 1
    assert {found.evaluations[name] for name in SPECTRAL} == {1 + AMBIENT}
    assert not any(error.any() for error in found.stderr.values())


def test_what_else_is_asked_for_changes_no_number():
    subject = subject_of(0.9)
    settings = SETTINGS.replace(trace=linalg.rademacher(4))
    alone = mem.scores(["flipd"], subject, settings, key=KEY, chunk_size=5)
    among = mem.scores(["cfg_norm", "flipd", "flipd_log_ratio"], subject, settings, key=KEY)
    np.testing.assert_allclose(alone.value["flipd"], among.value["flipd"], rtol=1e-5)
    np.testing.assert_allclose(alone.stderr["flipd"], among.stderr["flipd"], rtol=1e-4, atol=1e-5)
    assert np.all(alone.stderr["flipd"] > 0)
    # The same probes with and without the condition: one of the two FLIPDs is the one above.
    assert among.evaluations == {"cfg_norm": 2, "flipd": 5, "flipd_log_ratio": 10}
    assert among.total == 12


@pytest.mark.slow
def test_probes_in_common_cancel():
    """Two models that differ by little: the difference has far less noise than either."""
    subject = mem.Subject(samples_of(0.9), Memory(0.9), unconditional=Memory(0.9001))
    settings = SETTINGS.replace(trace=linalg.rademacher(4))
    found = mem.scores(["flipd", "flipd_difference"], subject, settings, key=KEY)
    assert found.value["flipd_difference"].std() < 0.05 * found.stderr["flipd"].mean()


@pytest.mark.slow
def test_stochastic_scores_carry_their_standard_errors():
    subject, exact = subject_of(0.9), mem.scores(["flipd"], subject_of(0.9), SETTINGS, key=KEY)
    settings = SETTINGS.replace(trace=linalg.rademacher(16), num_samples=256)
    found = mem.scores(["flipd", "curvature_difference"], subject, settings, key=KEY)
    z = (found.value["flipd"] - exact.value["flipd"]) / found.stderr["flipd"]
    assert np.mean(np.abs(z)) < 1.5
    assert np.max(np.abs(z)) < 5
    lost = jax.vmap(
        lambda x: (
            mem.curvature_difference(Memory(0.9), Memory(0.0), x, SIGMA, trace=linalg.exact()).value
        )
    )(subject.points)
    z = (found.value["curvature_difference"] - lost) / found.stderr["curvature_difference"]
    assert np.mean(np.abs(z)) < 1.5


def test_another_model_of_the_same_structure_compiles_nothing():
    mem.scores(["projected_trace"], subject_of(0.5), SETTINGS, key=KEY)
    before = _kept_program.cache_info()
    mem.scores(["projected_trace"], subject_of(0.8), SETTINGS.replace(sigma=0.2), key=KEY)
    after = _kept_program.cache_info()
    assert after.misses == before.misses
    assert after.hits == before.hits + 1


@pytest.mark.slow
def test_evaluations_are_counted():
    """By a denoiser that counts its calls, for what takes no derivative."""
    calls = []

    def count(x):
        calls.append(1)
        return np.zeros_like(x)

    def counting(x, sigma):
        return x / (1 + sigma**2) + jax.pure_callback(count, x, x, vmap_method="sequential")

    names = ["cfg_norm_along", "cfg_norm_encoded", "anisotropy", "denoising_loss", "normal_bundle"]
    settings = SETTINGS.replace(num_samples=3, bundle_samples=5)
    points = RNG.normal(size=(2, 4)).astype(np.float32)
    subject = mem.Subject(points, counting, unconditional=counting)
    for name in names:
        calls.clear()
        found = mem.scores([name], subject, settings, key=KEY)
        # A loop's last chunk is padded by repetition, and a path's last answer may be dropped.
        padding = 2 if name == "normal_bundle" else 0
        assert 2 * (found.total - 1) <= len(calls) <= 2 * found.total + padding, name


def test_costs_grow_with_the_space():
    costs = {name: d.evaluations(784, SETTINGS) for name, d in mem.DETECTORS.items()}
    assert costs["eigenvalue_count"] == costs["flipd"] == 785
    assert costs["projected_trace_log_ratio"] == 2 * 785
    assert costs["normal_bundle"] == 4 * 784
    assert costs["soft_count"] == 1 + 2 * 8 * 16
    assert costs["curvature_difference"] == 2 * 17
    assert costs["cfg_norm_along"] == (2 * 12 - 1) + 2 * 12
    assert costs["pixel_variance"] == costs["danger_zone"] == costs["pairwise_radius"] == 0
    assert costs["step_stability"] == 2 * 12 - 1


def test_nan_stays_in_sight():
    """One point that is not finite spoils its own scores, and none becomes a number."""
    subject = subject_of(0.9, data=samples_of(0.0))
    points = subject.points.copy()
    points[3, 0] = np.nan
    names = [*SPECTRAL, "flipd", "cfg_norm", "residual", "danger_zone", "pixel_variance"]
    found = mem.scores(names, subject.replace(points=points), SETTINGS, key=KEY)
    for name in names:
        assert np.isnan(found.value[name][3]), name
        assert np.all(np.isfinite(np.delete(found.value[name], 3))), name


# Other subjects


def test_copies_of_the_data_score_higher_than_new_points():
    data = RNG.normal(size=(30, 6)).astype(np.float32)
    points = np.concatenate([data[:5], RNG.normal(size=(5, 6)).astype(np.float32)])
    names = ["danger_zone", "nearest_distance", "residual", "flipd"]
    subject = mem.Subject(points, Empirical(data), data=data)
    found = mem.scores(names, subject, mem.Settings(0.1), key=KEY)
    for name in ("nearest_distance", "residual", "flipd"):
        assert found.value[name][:5].min() > found.value[name][5:].max(), name
    # Where the noise has room for one training point only, nothing is left to choose.
    wide = mem.scores(names, subject, mem.Settings(3.0), key=KEY)
    assert np.all(found.value["danger_zone"] > wide.value["danger_zone"])


def test_generations_that_agree_score_higher():
    same = 0.01 * RNG.normal(size=(1, 6, 8, 8))
    apart = RNG.normal(size=(1, 6, 8, 8))
    generations = np.concatenate([same, apart]).astype(np.float32)
    subject = mem.Subject(generations[:, 0], Memory(0.0), generations=generations)
    found = mem.scores(["pairwise_radius"], subject, mem.Settings(0.1), key=KEY)
    assert found.value["pairwise_radius"][0] > found.value["pairwise_radius"][1]
    expected = -mem.pairwise_radius(generations[1])
    np.testing.assert_allclose(found.value["pairwise_radius"][1], expected, rtol=1e-5)


def test_simple_images_score_higher_by_their_variance():
    points = np.stack([np.full((4, 4), 0.3), RNG.normal(size=(4, 4))]).astype(np.float32)
    subject = mem.Subject(points, Memory(0.0))
    value = mem.scores(["pixel_variance"], subject, mem.Settings(0.1), key=KEY).value
    assert value["pixel_variance"][0] > value["pixel_variance"][1]


def test_a_run_that_jumps_is_not_stable():
    """Normal runs of the population; the memorized model goes to one point, in other steps."""
    population, far = (denoise.Affine(Memory(k), 0.0, scale) for k, scale in ((0, 1.0), (1, 5.0)))
    starts = LEVELS[0] * jax.random.normal(jax.random.key(5), (64, AMBIENT))

    @jax.jit
    @jax.vmap
    def sizes(x):
        return mem.step_sizes(sample.solve_path(population, x, LEVELS).states)

    reference = mem.step_reference(sizes(starts))
    normal, other = (
        mem.scores(
            ["step_stability"],
            mem.Subject(samples_of(0.0), denoiser, reference=reference),
            SETTINGS,
            key=KEY,
        ).value["step_stability"]
        for denoiser in (population, far)
    )
    assert np.median(other) > np.quantile(normal, 0.9)


def test_conditions_are_bound_to_their_own_points():
    def two(x, t, c=None):
        return x / 2 if c is None else c * x

    model = denoise.from_function(two, noise.EDM(), prediction=denoise.x0, shape=(3,))
    points = RNG.normal(size=(4, 3)).astype(np.float32)
    conditions = np.array([0.0, 0.25, 0.5, 1.0], np.float32)
    subject = mem.Subject(points, model, conditions=conditions)
    names = ["flipd_difference", "projected_trace", "curvature_difference", "squared_difference"]
    found = mem.scores(names, subject, SETTINGS.replace(sigma=1.0), key=KEY)
    np.testing.assert_allclose(found.value["projected_trace"], -3 * conditions, rtol=1e-5)
    np.testing.assert_allclose(
        found.value["curvature_difference"], 3 * (0.5 - conditions), rtol=1e-5, atol=1e-6
    )
    expected = (conditions - 0.5) ** 2 * (points**2).sum(1)
    np.testing.assert_allclose(found.value["squared_difference"], expected, rtol=1e-4, atol=1e-6)


def test_the_inside_of_a_network_is_scored():
    dit = nn.DiT((4, 4), patch_size=2, width=8, depth=1, token_size=3, rngs=nnx.Rngs(0))
    model = denoise.from_nnx(dit, noise.VP(), shape=(4, 4))
    points = RNG.normal(size=(2, 4, 4)).astype(np.float32)
    conditions = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    names = ["spikiness", "attention_entropy", "bright_ending", "local_cfg_norm"]
    subject = mem.Subject(denoiser=model, points=points, conditions=conditions)
    found = mem.scores(names, subject, mem.Settings(0.5), key=KEY)
    assert all(np.all(np.isfinite(found.value[name])) for name in names)
    assert np.all(found.value["attention_entropy"] <= np.log(5) + 1e-5)
    assert np.all((found.value["bright_ending"] > 0) & (found.value["bright_ending"] < 1))
    assert found.total == 3


def test_a_detector_of_ones_own_and_one_on_the_host():
    largest = mem.Detector(
        "largest_eigenvalue",
        ("spectrum_of_denoiser",),
        lambda found: Estimate(-found["spectrum_of_denoiser"].eigenvalues[0], jnp.zeros(())),
    )
    size = mem.Detector("num_zeros", on_host=lambda points: (points == 0).sum(1).astype(float))
    subject = subject_of(0.9)
    found = mem.scores(["projected_trace", largest, size], subject, SETTINGS, key=KEY)
    assert found.total == 1 + AMBIENT
    assert found.evaluations["num_zeros"] == 0
    assert found.value["num_zeros"].shape == (24,)
    assert np.all(found.value["largest_eigenvalue"] < -0.5)
    only = mem.scores([size], subject, SETTINGS, key=KEY)
    assert list(only.value) == ["num_zeros"]


def test_the_registry_is_in_order():
    for name, detector in mem.DETECTORS.items():
        assert detector.name == name
        assert set(detector.quantities) <= set(mem.QUANTITIES)
        known = {
            field.name for cls in (mem.Subject, mem.Settings) for field in dataclasses.fields(cls)
        }
        assert set(detector.reads) <= known
    assert mem.DETECTORS["cfg_norm_along"].reads == ("levels", "unconditional")


@pytest.mark.parametrize(
    ("names", "subject", "settings", "message"),
    [
        (["flip"], {}, {}, "names 'flip'; there are flipd, projected_flipd"),
        ([], {}, {}, "at least one"),
        (["flipd", "flipd"], {}, {}, "must be different names"),
        (["cfg_norm"], {}, {}, r"`cfg_norm` reads `Subject\(unconditional=...\)`"),
        (["sharpness"], {"unconditional": Memory(0.0)}, {}, r"reads `Settings\(levels=...\)`"),
        (["step_stability"], {}, {"levels": LEVELS}, r"reads `Subject\(reference=...\)`"),
        (["danger_zone"], {}, {}, r"reads `Subject\(data=...\)`"),
        (["flipd"], {"conditions": np.ones(24)}, {}, "has no method `condition`"),
        (["flipd"], {"generations": np.ones((3, 2, 16))}, {}, "points"),
    ],
)
def test_bad_input_is_named(names, subject, settings, message):
    with pytest.raises(ValueError, match=message):
        mem.scores(
            names,
            mem.Subject(samples_of(0.5), Memory(0.5), **subject),
            mem.Settings(SIGMA, **settings),
            key=KEY,
        )


def test_a_key_is_needed():
    with pytest.raises(TypeError, match="needs a key"):
        mem.scores(["flipd"], subject_of(0.5), SETTINGS, key=None)


def test_compressed_sizes_are_minus_their_bytes():
    images = np.random.default_rng(0).uniform(size=(3, 8, 8)).astype(np.float32)
    images[0] = 0.5
    subject = mem.Subject(images, lambda x, sigma: x)
    found = mem.scores(["png_bytes", "zlib_bytes"], subject, SETTINGS, key=KEY)
    np.testing.assert_array_equal(found.value["png_bytes"], -mem.png_bytes(images))
    np.testing.assert_array_equal(found.value["zlib_bytes"], -mem.zlib_bytes(images))
    assert found.value["png_bytes"].argmax() == 0
    assert found.total == 0


def test_quantities_wait_for_each_other():
    """Decompositions of as many batches as cores, computed at once, would wait forever on CPU."""
    x = jnp.asarray(samples_of(0.0)[:2])
    baseline = Memory(0.2)

    def second_alone(x):
        at = At(x, Memory(0.5), None, baseline, None, None, None, SETTINGS)
        found = gather(("spectrum_of_denoiser", "spectrum_of_baseline"), at, KEY)
        return found["spectrum_of_baseline"].eigenvalues

    compiled = jax.jit(jax.vmap(second_alone)).lower(x).compile()
    assert compiled.as_text().count('custom_call_target="lapack_ssyevd_ffi"') == 2
    direct = jax.vmap(lambda x: lid.jacobian_spectrum(baseline, x, SIGMA).eigenvalues)(x)
    np.testing.assert_allclose(compiled(x), direct, atol=1e-5)


def test_what_could_not_be_computed_does_not_spread():
    def broken(x, sigma):
        return x * jnp.nan

    x = samples_of(0.0)[:2]
    names = ["projected_trace", "curvature_difference_baseline", "regeneration", "score_norm"]
    subject = mem.Subject(x, broken, baseline=Memory(0.0), data=x)
    found = mem.scores([*names, "nearest_distance", "pixel_variance"], subject, SETTINGS, key=KEY)
    assert all(np.isnan(found.value[name]).all() for name in names)
    assert np.isfinite(found.value["nearest_distance"]).all()
    assert np.isfinite(found.value["pixel_variance"]).all()
