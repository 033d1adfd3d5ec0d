"""Detectors of one point against closed forms: linear Gaussians, quadrature, maps made by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmh_jax import denoise, linalg, nn, noise, sample
from mmh_jax import memorization as mem
from mmh_jax.analytic import Empirical, LinearGaussian

RNG = np.random.default_rng(0)
DIM, SIGMA = 6, 0.3
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}


def gains(variances, sigma=SIGMA):
    return variances / (variances + sigma**2)


WIDE, NARROW = np.array([4.0, 2.0, 1.0, 0.5, 0.1, 0.0]), np.array([1.0, 0.0, 1.0, 0.1, 0.1, 0.0])
MEAN, CENTRE = RNG.normal(size=DIM), RNG.normal(size=DIM)
ROTATION = np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0]
X = RNG.normal(size=DIM)


def gaussian(mean, variances, rotation=None):
    """The exact denoiser of N(mean, R diag(variances) R^T)."""
    rotation = np.eye(DIM) if rotation is None else rotation

    def denoiser(x, sigma):
        turn = jnp.asarray(rotation, x.dtype)
        spread, m = jnp.asarray(variances, x.dtype), jnp.asarray(rotation @ mean, x.dtype)
        with jax.default_matmul_precision("highest"):
            return m + turn @ (spread / (spread + sigma**2) * (turn.T @ (x - m)))

    return denoiser


CONDITIONAL, NULL = gaussian(CENTRE, NARROW), gaussian(MEAN, WIDE)


def answers(x, sigma=SIGMA):
    """D_c, D_0 and the diagonals of J_c, J_0, in NumPy."""
    g, h = gains(NARROW, sigma), gains(WIDE, sigma)
    return CENTRE + g * (x - CENTRE), MEAN + h * (x - MEAN), g, h


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def close(found, expected, dtype):
    assert np.asarray(found).dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def anisotropy_of(noise, low, high):
    """From the definition, in scores, without the library's order of operations."""
    with_condition, without, *_ = answers(noise, low)
    change, null = (with_condition - without) / low**2, (without - noise) / low**2
    cosine = change @ null / np.linalg.norm(change) / np.linalg.norm(null)
    with_condition, without, *_ = answers(high * noise, high)
    return cosine + np.linalg.norm(with_condition - without) / high


D_C, D_0, G, H = answers(X)
PAIR_CASES = {
    "cfg_norm": (mem.cfg_norm, np.linalg.norm(D_C - D_0) / SIGMA),
    # |(H_c - H_0)(s_c - s_0)|^2 sigma^6, from scores and Hessians
    "sharpness": (
        mem.sharpness,
        np.sum((((G - 1) - (H - 1)) / SIGMA**2 * (D_C - D_0) / SIGMA**2) ** 2) * SIGMA**6,
    ),
    "anisotropy": (functools.partial(mem.anisotropy, high=7.0), anisotropy_of(X, SIGMA, 7.0)),
    "squared_difference": (mem.squared_difference, (D_C - D_0) ** 2 / SIGMA**2),
    "curvature_map": (
        lambda *a: mem.curvature_map(*a, diagonal=linalg.exact_diagonal()).value,
        H - G,
    ),
    "curvature_difference": (
        lambda *a: mem.curvature_difference(*a, trace=linalg.exact()).value,
        np.sum(H - G),
    ),
}


@pytest.mark.parametrize("name", PAIR_CASES)
def test_a_pair_is_its_closed_form(dtype, name):
    function, expected = PAIR_CASES[name]
    x = jnp.asarray(X, dtype)
    close(function(CONDITIONAL, NULL, x, SIGMA), expected, dtype)
    jitted = jax.jit(lambda x, sigma: function(CONDITIONAL, NULL, x, sigma))
    close(jitted(x, SIGMA), expected, dtype)


@pytest.mark.parametrize("name", ["cfg_norm", "sharpness", "anisotropy", "curvature_difference"])
def test_vmap_is_a_loop_and_no_norm_is_of_a_batch(x64, name):
    function = PAIR_CASES[name][0]
    points = jnp.asarray(RNG.normal(size=(5, DIM)))
    one = functools.partial(function, CONDITIONAL, NULL)
    many = jax.vmap(lambda x: one(x, SIGMA))(points)
    assert many.shape == (5,)
    np.testing.assert_allclose(many, [one(x, SIGMA) for x in points], rtol=1e-10)


@pytest.mark.parametrize("name", ["cfg_norm", "sharpness", "anisotropy", "curvature_difference"])
def test_a_rotation_of_the_space_changes_nothing(x64, name):
    function, expected = PAIR_CASES[name]
    turned = (gaussian(CENTRE, NARROW, ROTATION), gaussian(MEAN, WIDE, ROTATION))
    np.testing.assert_allclose(function(*turned, ROTATION @ X, SIGMA), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["cfg_norm", "sharpness", "curvature_difference"])
def test_units_change_nothing(x64, name):
    function, expected = PAIR_CASES[name]
    moved = [denoise.Affine(each, 0.7, 3.0) for each in (CONDITIONAL, NULL)]
    np.testing.assert_allclose(function(*moved, 0.7 + 3 * X, 3 * SIGMA), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["curvature_difference", "anisotropy"])
def test_conditional_and_unconditional_are_not_alike(x64, name):
    """Swapped, the sign of the trace, and the cosine, are others."""
    function, expected = PAIR_CASES[name]
    swapped = function(NULL, CONDITIONAL, X, SIGMA)
    assert abs(swapped - expected) > 0.5


def test_anisotropy_reads_the_spread_and_survives_no_difference(x64):
    unit = mem.anisotropy(CONDITIONAL, NULL, X, SIGMA, 7.0)
    moved = [denoise.Affine(each, 0.0, 3.0) for each in (CONDITIONAL, NULL)]
    np.testing.assert_allclose(
        mem.anisotropy(*moved, X, 3 * SIGMA, 21.0, spread=3.0), unit, rtol=1e-9
    )
    assert mem.anisotropy(NULL, NULL, X, SIGMA, 7.0) == 0


def test_the_jacobian_of_sharpness_is_of_everything(x64):
    """Of a difference that is not linear, against central differences."""

    def curved(x, sigma):
        return jnp.sin(2 * x) * jnp.roll(x, 1)

    def difference(x):
        return curved(x, SIGMA) - NULL(x, SIGMA)

    step = difference(X) * 1e-6
    along = (difference(X + step) - difference(X - step)) / 2e-6
    expected = np.sum(along**2) / SIGMA**2
    np.testing.assert_allclose(mem.sharpness(curved, NULL, X, SIGMA), expected, rtol=1e-7)


def test_score_norm(dtype):
    x = jnp.asarray(X, dtype)
    close(mem.score_norm(NULL, x, SIGMA), np.linalg.norm(X - D_0) / SIGMA, dtype)


# Diagonals


MATRIX = RNG.normal(size=(DIM, DIM))


def test_a_diagonal_from_signs_has_its_standard_error(x64):
    keys = jax.random.split(jax.random.key(0), 2000)
    strategy = linalg.rademacher_diagonal(16)
    found = jax.vmap(lambda key: strategy(lambda v: MATRIX @ v, jnp.zeros(DIM), key=key))(keys)
    expected = np.diag(MATRIX)
    spread = np.sqrt((np.sum(MATRIX**2, 1) - expected**2) / 16)
    np.testing.assert_allclose(found.value.std(0), spread, rtol=0.1)
    mean_error = np.abs(found.value.mean(0) - expected) / (spread / np.sqrt(2000))
    assert np.all(mean_error < 4)
    covered = np.mean(np.abs(found.value - expected) < 1.96 * found.stderr, axis=0)
    assert np.all((covered > 0.92) & (covered < 0.98)), covered


def test_diagonals_keep_the_shape_and_do_not_depend_on_chunks(x64):
    like = jnp.zeros((2, 3))

    def product(v):
        return (MATRIX @ v.reshape(-1)).reshape(2, 3)

    exact = linalg.exact_diagonal(4)(product, like)
    np.testing.assert_allclose(exact.value, np.diag(MATRIX).reshape(2, 3), rtol=1e-12)
    assert exact.stderr.shape == (2, 3)
    assert not np.any(exact.stderr)
    key = jax.random.key(1)
    one, all_ = (linalg.rademacher_diagonal(8, size)(product, like, key=key) for size in (1, 8))
    np.testing.assert_allclose(one.value, all_.value, rtol=1e-12)
    np.testing.assert_allclose(one.stderr, all_.stderr, rtol=1e-12)


def test_the_trace_of_the_map_is_the_difference(x64):
    """The same probes: the sum of the map is the trace, draw by draw."""
    turned = (gaussian(CENTRE, NARROW, ROTATION), gaussian(MEAN, WIDE, ROTATION))
    key = jax.random.key(3)
    image = mem.curvature_map(*turned, X, SIGMA, key=key)
    total = mem.curvature_difference(*turned, X, SIGMA, key=key)
    np.testing.assert_allclose(image.value.sum(), total.value, rtol=1e-9)
    assert abs(total.value - np.sum(H - G)) < 4 * total.stderr
    assert image.value.shape == image.stderr.shape == (DIM,)


def test_costs_of_strategies():
    costs = {
        linalg.exact(): 50,
        linalg.rademacher(16): 16,
        linalg.hutchpp(30): 30,
        linalg.hutchpp(300): 50,
        linalg.xtrace(20): 20,
        linalg.positive_exact(): 50,
        linalg.positive_lanczos(4, 8): 64,
        linalg.exact_diagonal(): 50,
        linalg.rademacher_diagonal(16): 16,
    }
    for strategy, expected in costs.items():
        assert linalg.products_of(strategy, 50) == expected
    assert np.isnan(linalg.products_of(lambda matvec, like, key=None: None, 50))


# Along a path


LEVELS = sample.karras_levels(24, sigma_min=0.02, sigma_max=10.0)


def test_a_path_ends_where_heun_does_and_denoises_its_states():
    start = 10.0 * jnp.asarray(X, jnp.float32)
    path = sample.solve_path(NULL, start, LEVELS)
    assert path.states.shape == path.denoised.shape == (24, DIM)
    np.testing.assert_array_equal(path.states[0], start)
    np.testing.assert_allclose(path.denoised[-1], sample.solve(NULL, start, LEVELS), rtol=1e-6)
    again = jax.vmap(NULL)(path.states, path.sigmas)
    np.testing.assert_allclose(path.denoised, again, rtol=1e-5, atol=1e-6)


def test_a_path_follows_the_flow(x64):
    """x_i - m_i scales as sqrt(l_i + sigma^2)."""
    levels = sample.karras_levels(400, sigma_min=0.02, sigma_max=10.0)
    path = sample.solve_path(NULL, 10.0 * X, levels)
    growth = np.sqrt((WIDE + np.asarray(levels)[:, None] ** 2) / (WIDE + 100.0))
    expected = MEAN + growth * (10 * X - MEAN)
    np.testing.assert_allclose(path.states, expected, rtol=2e-3, atol=2e-3)


def test_cfg_norm_along_is_that_of_each_state(x64):
    path = sample.solve_path(CONDITIONAL, 10.0 * X, jnp.asarray(LEVELS, float))
    along = mem.cfg_norm_along(CONDITIONAL, NULL, path)
    each = [
        np.linalg.norm(np.subtract(*answers(np.asarray(x), float(sigma))[:2])) / float(sigma)
        for x, sigma in zip(path.states, path.sigmas, strict=True)
    ]
    np.testing.assert_allclose(along, each, rtol=1e-9)


def test_encoded_cfg_norm_is_at_the_end_of_the_flow(x64):
    up = np.geomspace(0.05, 2.0, 400)
    for flow, mean, variances in ((None, CENTRE, NARROW), (NULL, MEAN, WIDE)):
        end = mean + np.sqrt((variances + 4.0) / (variances + 0.05**2)) * (X - mean)
        expected = np.linalg.norm(np.subtract(*answers(end, 2.0)[:2])) / 2.0
        found = mem.encoded_cfg_norm(CONDITIONAL, NULL, X, up, flow=flow)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        compiled = jax.jit(lambda x, f=flow: mem.encoded_cfg_norm(CONDITIONAL, NULL, x, up, flow=f))
        np.testing.assert_allclose(compiled(X), found, rtol=1e-9)


def test_step_stability_is_the_largest_z_score(x64):
    runs = RNG.normal(size=(50, 8, 4))
    sizes = np.linalg.norm(np.diff(runs, axis=1), axis=2)
    reference = mem.step_reference(jax.vmap(mem.step_sizes)(runs))
    np.testing.assert_allclose(reference.mean, sizes.mean(0), rtol=1e-12)
    run = RNG.normal(size=(8, 4))
    z = (np.linalg.norm(np.diff(run, axis=0), axis=1) - sizes.mean(0)) / sizes.std(0, ddof=1)
    np.testing.assert_allclose(mem.step_stability(run, reference), z.max(), rtol=1e-12)
    jumping = run.copy()
    jumping[4:] += 30.0
    assert mem.step_stability(jumping, reference) > 10
    still = mem.step_reference(np.ones((3, 7)))
    assert not np.isfinite(mem.step_stability(run, still))


# Inside a network


def perturbed(network):
    """`(apply, params)`, no parameter 0, so that everything inside depends on everything."""
    apply, params = nn.split(network)
    rng = np.random.default_rng(0)
    fill = [
        jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(params)
    ]
    return apply, jax.tree.unflatten(jax.tree.structure(params), fill)


@pytest.fixture(scope="module")
def network():
    dit = nn.DiT((8, 8, 1), patch_size=2, width=8, depth=1, token_size=3, rngs=nnx.Rngs(0))
    return perturbed(dit)


IMAGE = jnp.asarray(RNG.normal(size=(8, 8, 1)), jnp.float32)
TOKENS = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)


def wrapped(network):
    apply, params = network
    edm = denoise.precondition(apply, params, sigma_data=0.5, shape=(8, 8, 1))
    eps = denoise.NetworkDenoiser(params, noise.VP(), apply=apply, shape=(8, 8, 1))
    return {
        "edm": edm,
        "affine": denoise.Affine(edm, 0.3, 2.0),
        "twice": denoise.Affine(denoise.Affine(edm, 0.3, 2.0), -0.1, 0.5),
        "vp": eps,
    }


@pytest.mark.parametrize("name", ["edm", "affine", "twice", "vp"])
def test_features_come_with_the_denoisers_own_answer(network, name):
    denoiser = wrapped(network)[name].condition(TOKENS)
    denoised, inside = jax.jit(denoise.features)(denoiser, IMAGE, 0.4)
    answer = jax.jit(lambda denoiser, x: denoiser(x, 0.4))(denoiser, IMAGE)
    np.testing.assert_allclose(denoised, answer, rtol=2e-5, atol=2e-5)
    assert inside.bottleneck.shape == (4, 4, 8)
    assert all(layer.shape[-1] == 4 for layer in inside.cross_attention)


def test_features_are_those_of_the_network_at_its_own_input(network):
    apply, params = network
    edm = wrapped(network)["edm"].condition(TOKENS)
    inside = jax.jit(mem.inside_at)(denoise.Affine(edm, 0.3, 2.0), 0.3 + 2 * IMAGE, 0.8)
    total = np.sqrt(0.4**2 + 0.5**2)
    read = jax.jit(nn.features, static_argnums=0)
    _, expected = read(apply, params, IMAGE / total, jnp.log(0.4) / 4, TOKENS)
    np.testing.assert_allclose(inside.bottleneck, expected.bottleneck, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        inside.cross_attention[0], expected.cross_attention[0], rtol=1e-4, atol=1e-5
    )


def test_a_users_apply_may_show_features():
    class Mine:
        def __call__(self, params, x_t, t):
            return params * x_t

        def features(self, params, x_t, t):
            return params * x_t, nn.Features(x_t[None, None], ())

    mine = denoise.NetworkDenoiser(2.0, noise.EDM(), apply=Mine(), prediction=denoise.x0)
    denoised, inside = denoise.features(mine, jnp.ones(3), 0.1)
    np.testing.assert_allclose(denoised, 2.0)
    np.testing.assert_allclose(mem.spikiness(inside), 0.0)


def test_who_has_no_features_says_so(network):
    plain = denoise.from_function(lambda x, t: x, noise.EDM(), prediction=denoise.x0)
    edm = wrapped(network)["edm"]
    mlp = denoise.from_nnx(nn.ResidualMLP((3,), width=8, depth=1, rngs=nnx.Rngs(0)), noise.VP())
    for denoiser, message in (
        (lambda x, sigma: x, "function, which shows no features"),
        (denoise.Guided(edm, edm, 2.0), "ask its `conditional`"),
        (plain, "whose `apply` is a _Function"),
        (mlp, "ResidualMLP, which shows no features"),
        (denoise.Affine(plain, 0.0, 2.0), "whose `apply` is a _Function"),
    ):
        with pytest.raises(TypeError, match=message):
            denoise.features(denoiser, jnp.ones(3), 0.1)


def maps(*layers):
    return nn.Features(jnp.zeros((1, 1, 1)), tuple(jnp.asarray(layer) for layer in layers))


def softmax_maps(heads, height, width, length):
    raw = RNG.normal(size=(heads, height, width, length))
    return np.exp(raw) / np.exp(raw).sum(-1, keepdims=True)


def test_spikiness_is_the_standard_deviation(x64):
    bottleneck = RNG.normal(size=(4, 4, 16))
    inside = nn.Features(jnp.asarray(bottleneck), ())
    np.testing.assert_allclose(mem.spikiness(inside), bottleneck.std(), rtol=1e-12)


def test_attention_entropy_is_of_the_mean_attention(x64):
    a, b = softmax_maps(2, 4, 4, 5), softmax_maps(1, 2, 2, 5)
    share = (a.mean((0, 1, 2)) + b.mean((0, 1, 2))) / 2
    expected = -np.sum(share * np.log(share))
    np.testing.assert_allclose(mem.attention_entropy(maps(a, b)), expected, rtol=1e-12)
    one_token = np.zeros((1, 2, 2, 5))
    one_token[..., 0] = 1
    assert mem.attention_entropy(maps(one_token)) == 0
    assert np.isnan(mem.attention_entropy(maps(one_token * np.nan)))
    # Attention that settles on one token has less than attention that looks at several.
    assert mem.attention_entropy(maps(one_token)) < mem.attention_entropy(maps(a))


def test_bright_ending_finds_the_copied_region(x64):
    fine, coarse = np.full((2, 4, 4, 3), 0.1), np.full((1, 2, 2, 3), 0.1)
    fine[:, :2, :2, 2], coarse[:, 0, 0, 2] = 0.9, 0.9
    image = mem.bright_ending(maps(coarse, fine))
    assert image.shape == (4, 4)
    assert np.all(image[:2, :2] > 0.5)
    np.testing.assert_allclose(image[3, 3], 0.1, rtol=1e-6)
    np.testing.assert_allclose(mem.bright_ending(maps(coarse), token=1), np.full((2, 2), 0.1))
    larger = mem.bright_ending(maps(fine), shape=(8, 8))
    np.testing.assert_allclose(larger.mean(), fine[..., 2].mean(), rtol=0.05)


def test_local_cfg_norm_is_that_of_the_mask(x64):
    x, mask = RNG.normal(size=(4, 4, 2)), np.zeros((4, 4))
    mask[0, :2] = 1.0

    def zero(x, sigma):
        return 0 * x

    def itself(x, sigma):
        return x

    expected = np.linalg.norm(x[0, :2]) / SIGMA / (2 / 16)
    np.testing.assert_allclose(
        mem.local_cfg_norm(itself, zero, x, SIGMA, mask), expected, rtol=1e-9
    )
    constant = mem.local_cfg_norm(itself, zero, x, SIGMA, np.full((4, 4), 0.3))
    np.testing.assert_allclose(constant, mem.cfg_norm(itself, zero, x, SIGMA), rtol=1e-9)
    assert np.isnan(mem.local_cfg_norm(itself, zero, x, SIGMA, np.zeros((4, 4))))


# Against generations and data


def test_tiled_distance_is_the_largest_of_the_tiles(x64):
    a, b = RNG.normal(size=(2, 8, 8, 3))
    blocks = [
        np.linalg.norm((a - b)[i : i + 2, j : j + 2])
        for i in range(0, 8, 2)
        for j in range(0, 8, 2)
    ]
    np.testing.assert_allclose(mem.tiled_distance(a, b), max(blocks), rtol=1e-12)
    np.testing.assert_allclose(mem.tiled_distance(a, b, tiles=1), np.linalg.norm(a - b), rtol=1e-12)
    np.testing.assert_allclose(
        mem.tiled_distance(a[..., 0], b[..., 0], tiles=8), np.abs(a - b)[..., 0].max(), rtol=1e-12
    )


def clique_threshold(distances, size):
    """The least threshold at which `size` points are pairwise closer, by trying all subsets."""
    import itertools

    return min(
        max(distances[i, j] for i, j in itertools.combinations(subset, 2))
        for subset in itertools.combinations(range(len(distances)), size)
    )


def test_pairwise_radius_is_carlinis_clique_to_a_factor_of_two(x64):
    generations = np.concatenate([RNG.normal(size=(5, 4, 4)), 0.1 * RNG.normal(size=(4, 4, 4))])
    distances = np.array(
        [[float(mem.tiled_distance(a, b, tiles=2)) for b in generations] for a in generations]
    )
    for others in (1, 3, 6):
        radius = mem.pairwise_radius(generations, tiles=2, num_close=others)
        expected = np.sort(distances, axis=1)[:, others].min()
        np.testing.assert_allclose(radius, expected, rtol=1e-12)
        clique = clique_threshold(distances, others + 1)
        assert radius <= clique * (1 + 1e-9)
        assert clique <= 2 * radius * (1 + 1e-9)
    half = mem.pairwise_radius(generations, tiles=2)
    assert half == mem.pairwise_radius(generations, tiles=2, num_close=4)


def test_danger_zone_against_two_points_by_quadrature(x64):
    """Two points at distance a: the weights are logistic in one normal coordinate."""
    a, sigma = 1.3, 0.8
    data = np.zeros((2, 3))
    data[1, 0] = a
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    # x at the first point: the log ratio of its weight is (a^2 - 2 a sigma z) / 2 sigma^2.
    logit = (a**2 - 2 * a * sigma * nodes) / (2 * sigma**2)
    expected = np.sum(weights / (1 + np.exp(-np.abs(logit)))) / np.sqrt(2 * np.pi)
    found = mem.danger_zone(data[0], sigma, data, key=jax.random.key(0), num_samples=4000)
    assert abs(found.value - expected) < 4 * found.stderr
    assert found.stderr < 0.005


def test_danger_zone_has_its_limits_and_ignores_chunks(x64):
    data = RNG.normal(size=(37, 5))
    key = jax.random.key(0)
    assert mem.danger_zone(data[3], 1e-3, data, key=key).value > 1 - 1e-9
    far = mem.danger_zone(data[3], 1e4, data, key=key)
    np.testing.assert_allclose(far.value, 1 / 37, rtol=1e-3)
    values = [mem.danger_zone(data[3], 0.7, data, key=key, chunk_size=c).value for c in (1, 10, 64)]
    np.testing.assert_allclose(values, values[0], rtol=1e-12)
    # An exact duplicate leaves two points that cannot be told apart.
    double = np.concatenate([data, data[3:4]])
    np.testing.assert_allclose(
        mem.danger_zone(data[3], 1e-3, double, key=key).value, 0.5, rtol=1e-9
    )


def test_nearest_distance_and_variance(x64):
    data, x = RNG.normal(size=(20, 4, 2)), RNG.normal(size=(4, 2))
    expected = np.linalg.norm((data - x).reshape(20, -1), axis=1).min()
    np.testing.assert_allclose(mem.nearest_distance(x, data), expected, rtol=1e-12)
    np.testing.assert_allclose(mem.pixel_variance(x), x.var(), rtol=1e-12)


# LID(x | c) <= LID(x), on exact pairs


def test_a_condition_takes_dimensions_and_gives_none(x64):
    """Gaussian (x, c): p(x | c) has the smaller covariance, so the curvature difference is >= 0."""
    factor = RNG.normal(size=(DIM, 4))
    seen = RNG.normal(size=(2, 4))
    inner = np.eye(4) - seen.T @ np.linalg.solve(seen @ seen.T + 0.1 * np.eye(2), seen)

    def of(covariance):
        def denoiser(x, sigma):
            return covariance @ jnp.linalg.solve(covariance + sigma**2 * jnp.eye(DIM), x)

        return denoiser

    pair = (of(factor @ inner @ factor.T), of(factor @ factor.T))
    for sigma in (0.01, 0.1, 1.0, 10.0):
        lost = mem.curvature_difference(*pair, X, sigma, trace=linalg.exact()).value
        assert lost > -1e-9
    assert mem.curvature_difference(*pair, X, 0.3, trace=linalg.exact()).value > 0.1


def test_a_condition_that_names_points_leaves_no_dimension(x64):
    data = jnp.asarray(RNG.normal(size=(50, DIM)))
    named, all_ = (
        Empirical(data[:1]),
        LinearGaussian(jnp.zeros(DIM), jnp.eye(DIM)[:, :3], jnp.ones(3)),
    )
    lost = mem.curvature_difference(named, all_, data[0], 0.01, trace=linalg.exact())
    np.testing.assert_allclose(lost.value, 3.0, rtol=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mem.cfg_norm(NULL, NULL, np.arange(3), 0.1), TypeError, "real data units"),
        (lambda: mem.cfg_norm(NULL, NULL, X, -0.1), ValueError, "finite positive"),
        (lambda: mem.cfg_norm(NULL, lambda x, s: x[:1], X, 0.1), ValueError, "a point like x"),
        (
            lambda: mem.cfg_norm(Empirical(np.ones((4, 3))), NULL, np.ones((2, 3)), 0.1),
            ValueError,
            "vmap",
        ),
        (lambda: mem.sharpness(NULL, NULL, X, [0.1, 0.2]), ValueError, "one noise level"),
        (lambda: mem.anisotropy(NULL, NULL, X, 0.1, np.nan), ValueError, "finite positive"),
        (lambda: mem.curvature_map(NULL, NULL, X, 0.1), TypeError, "needs a key"),
        (lambda: mem.curvature_difference(NULL, NULL, X, 0.1), TypeError, "needs a key"),
        (
            lambda: mem.curvature_difference(NULL, NULL, X, 0.1, trace=linalg.positive_exact()),
            ValueError,
            "has no sign",
        ),
        (lambda: linalg.rademacher_diagonal(0), ValueError, "at least 1"),
        (lambda: mem.encoded_cfg_norm(NULL, NULL, X, [1.0, 0.1]), ValueError, "increasing"),
        (lambda: mem.step_sizes(np.ones((1, 3))), ValueError, "S >= 2"),
        (lambda: mem.step_reference(np.ones(3)), ValueError, "at least 2 runs"),
        (
            lambda: mem.step_stability(np.ones((4, 2)), mem.StepReference(np.ones(5), np.ones(5))),
            ValueError,
            "of 5 steps and the run has 3",
        ),
        (lambda: mem.attention_entropy(maps()), ValueError, "without cross-attention"),
        (lambda: mem.bright_ending(maps(np.ones((1, 2, 2, 3))), token=3), ValueError, "3 tokens"),
        (
            lambda: mem.local_cfg_norm(NULL, NULL, np.ones((4, 4)), 0.1, np.ones((2, 2))),
            ValueError,
            "Pass `shape=`",
        ),
        (
            lambda: mem.tiled_distance(np.ones((6, 6)), np.ones((6, 6))),
            ValueError,
            "does not divide",
        ),
        (lambda: mem.tiled_distance(np.ones(4), np.ones(5)), ValueError, "the shapes"),
        (lambda: mem.pairwise_radius(np.ones((1, 4)), tiles=1), ValueError, "n >= 2"),
        (lambda: mem.pairwise_radius(np.ones((3, 4)), tiles=1, num_close=3), ValueError, "n >= 2"),
        (
            lambda: mem.danger_zone(X, 0.1, np.ones((5, 2)), key=jax.random.key(0)),
            ValueError,
            "for a point of shape",
        ),
        (lambda: mem.danger_zone(X, 0.1, X[None], key=None), TypeError, "needs a key"),
        (lambda: mem.nearest_distance(X, np.ones((3, 2))), ValueError, "shape"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
