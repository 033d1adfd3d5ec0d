"""Decoders whose image has a known dimension; inversion against closed forms and distances."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmh_jax import lid
from mmh_jax.analytic import LinearGaussian

KEY = jax.random.key(0)


def linear(shape, singular_values, seed=0, dtype=jnp.float64):
    """A matrix of this shape and spectrum, completed by zeros."""
    rng = np.random.default_rng(seed)
    rank = len(singular_values)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0][:, :rank] for n in shape)
    return jnp.asarray(left * np.asarray(singular_values) @ right.T, dtype)


def mlp(widths, seed=0, dtype=jnp.float64):
    """Injective where the widths do not fall: tanh(h) + .3 h, and matrices of full rank."""
    rng = np.random.default_rng(seed)
    weights = [
        jnp.asarray(rng.normal(size=(n_out, n_in)) / np.sqrt(n_in), dtype)
        for n_in, n_out in itertools.pairwise(widths)
    ]

    def decoder(z):
        for weight in weights[:-1]:
            z = weight @ z
            z = jnp.tanh(z) + 0.3 * z
        return weights[-1] @ z

    return decoder


def stereographic(z):
    """R^d to the unit sphere in R^(d+1), conformal: all singular values are 2 / (1 + |z|^2)."""
    norm2 = jnp.sum(z**2)
    return jnp.append(2 * z, norm2 - 1) / (1 + norm2)


def torus(z):
    """Radii 3 and 1; z[2] is ignored.  Singular values 3 + cos v, 1, 0."""
    u, v, _ = z
    ring = 3 + jnp.cos(v)
    return jnp.stack([ring * jnp.cos(u), ring * jnp.sin(u), jnp.sin(v)])


def direction(z):
    """R^3 to the unit sphere; the radius collapses."""
    return z / jnp.linalg.norm(z)


# The spectrum.


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (20, 20)])
@pytest.mark.parametrize("chunk_size", [3, 32])
def test_linear_of_rank_7(x64, shape, chunk_size):
    truth = np.geomspace(5, 0.2, 7)
    matrix = linear(shape, truth)
    values = lid.decoder_spectrum(lambda z: matrix @ z, jnp.ones(shape[1]), chunk_size=chunk_size)
    assert values.shape == (20,)
    np.testing.assert_allclose(values[:7], truth, rtol=1e-10)
    np.testing.assert_allclose(values[7:], 0, atol=1e-13)
    assert lid.rank_by_gap(values) == 7
    assert lid.rank_by_threshold(values / values[0], 1e-3) == 7


def test_nonlinear_decoders_with_a_known_spectrum(x64):
    z = jnp.array([0.3, -1.2, 0.7])
    values = lid.decoder_spectrum(stereographic, z)
    np.testing.assert_allclose(values, 2 / (1 + jnp.sum(z**2)), rtol=1e-12)
    values = lid.decoder_spectrum(torus, z)
    np.testing.assert_allclose(values, [3 + np.cos(-1.2), 1, 0], rtol=1e-12, atol=1e-15)
    values = lid.decoder_spectrum(direction, z)
    np.testing.assert_allclose(values, [1 / jnp.linalg.norm(z)] * 2 + [0], rtol=1e-12, atol=1e-15)
    assert lid.rank_by_gap(values) == 2


@pytest.mark.parametrize("widths", [(10, 4, 30), (30, 4, 20, 10)])
def test_a_bottleneck_bounds_the_rank(widths):
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(1).normal(size=widths[0]))
        truth = np.linalg.svd(jax.jacfwd(mlp(widths))(z), compute_uv=False)
        values = lid.decoder_spectrum(mlp(widths), z)
        np.testing.assert_allclose(values, truth, rtol=1e-6, atol=1e-12)
        assert lid.rank_by_gap(values) == lid.rank_by_threshold(values / values[0], 1e-6) == 4
    z = np.asarray(z, np.float32)
    single = lid.decoder_spectrum(mlp(widths, dtype=jnp.float32), z)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, truth, atol=2e-6 * truth[0])
    assert lid.rank_by_gap(single) == lid.rank_by_threshold(single / single[0], 1e-3) == 4


def test_small_singular_values_survive_single_precision():
    truth = [1.0, 0.5, 1e-2, 1e-4]
    matrix = linear((12, 6), truth, dtype=jnp.float32)
    values = lid.decoder_spectrum(lambda z: jnp.matmul(matrix, z, precision="highest"), jnp.ones(6))
    np.testing.assert_allclose(values[:4], truth, rtol=5e-3)
    assert values[4] < 1e-6
    assert lid.rank_by_gap(values, floor=1e-7) == 4


def test_products_are_taken_on_the_smaller_side():
    """A loop of unknown length has no reverse mode; a custom_vjp no forward mode."""

    def tall(z):
        doubled = jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, 2 * s[1]), (0, z))[1]
        return jnp.concatenate([doubled, z])

    np.testing.assert_allclose(lid.decoder_spectrum(tall, jnp.ones(2)), 5**0.5, rtol=1e-6)

    @jax.custom_vjp
    def wide(z):
        return 3 * z[:2]

    wide.defvjp(lambda z: (wide(z), None), lambda _, ct: (jnp.concatenate([3 * ct, 0 * ct]),))
    np.testing.assert_allclose(lid.decoder_spectrum(wide, jnp.ones(4)), 3, rtol=1e-6)


def test_latents_and_points_have_any_shape_and_half_precision_works(x64):
    matrix = linear((24, 6), [4.0, 2.0, 1.0])
    expected = [4, 2, 1, 0, 0, 0]
    for decoder, shape in (
        (lambda z: (matrix @ z.reshape(-1)).reshape(3, 4, 2), (2, 3, 1)),
        (lambda z: (matrix.T @ z.reshape(-1)).reshape(6, 1), (4, 6)),
    ):
        values = lid.decoder_spectrum(decoder, jnp.ones(shape))
        np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-13)
    half = lid.decoder_spectrum(lambda z: 2 * z.astype(jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, 2)


@jax.jit
def rotated_spectrum(z, left, right):
    return lid.decoder_spectrum(lambda z: left @ mlp((4, 8, 12))(right @ z), z)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rotations_of_x_and_z_change_nothing(seed):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (12, 4))
    with jax.enable_x64(True):
        z = rng.normal(size=4)
        plain = rotated_spectrum(jnp.asarray(z), jnp.eye(12), jnp.eye(4))
        turned = rotated_spectrum(jnp.asarray(right.T @ z), jnp.asarray(left), jnp.asarray(right))
    np.testing.assert_allclose(turned, plain, rtol=1e-9)


def test_spectrum_under_jit_and_vmap(x64):
    decoder = mlp((5, 3, 9))
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)))
    plain = [lid.decoder_spectrum(decoder, z) for z in latents]
    many = jax.jit(jax.vmap(lambda z: lid.decoder_spectrum(decoder, z)))(latents)
    np.testing.assert_allclose(many, plain, rtol=1e-10, atol=1e-13)


# The count at a noise level.


def test_rank_at_noise_is_the_flipd_trace_of_the_linear_decoder(x64):
    scales = np.array([3.0, 1.0, 0.2, 0.01])
    matrix = linear((10, 6), scales)
    basis = jnp.linalg.svd(matrix)[0][:, :4]
    mean = jnp.arange(10.0)
    model = LinearGaussian(mean, basis, jnp.asarray(scales))
    values = lid.decoder_spectrum(lambda z: mean + matrix @ z, jnp.ones(6))
    sigmas = jnp.array([1e-3, 0.1, 1.0, 30.0])
    curve = lid.rank_at_noise(values, sigmas)
    x = mean + matrix @ jnp.ones(6)
    traces = [jnp.trace(jax.jacfwd(model)(x, sigma)) for sigma in sigmas]
    np.testing.assert_allclose(curve, traces, rtol=1e-9)
    np.testing.assert_allclose(lid.rank_at_noise(values, 0.1), traces[1], rtol=1e-9)
    table = lid.rank_at_noise(jnp.stack([values, 2 * values]), sigmas[:, None])
    np.testing.assert_allclose(table[:, 0], curve, rtol=1e-12)


def test_rank_at_noise_neither_overflows_nor_has_an_infinite_slope():
    values = jnp.array([1e25, 1.0, 1e-25, 0.0])
    np.testing.assert_allclose(lid.rank_at_noise(values, 1e-30), 3, rtol=1e-6)
    np.testing.assert_allclose(lid.rank_at_noise(values, 1.0), 1.5, rtol=1e-6)
    slope = jax.grad(lid.rank_at_noise)(values[1:], 1.0)
    np.testing.assert_allclose(slope, [0.5, 0, 0], atol=1e-6)


# Inversion.


def inverse_of(decoder, size, **options):
    return jax.jit(lambda x, key: lid.invert(decoder, x, latent_shape=(size,), key=key, **options))


@pytest.mark.parametrize(
    ("dtype", "error", "residual"),
    [(jnp.float64, 1e-9, 1e-10), (jnp.float32, 2e-5, 5e-6)],
)
def test_an_injective_decoder_is_inverted(x64, dtype, error, residual):
    decoder = mlp((3, 16, 16, 20), dtype=dtype)
    latents = jnp.asarray(np.random.default_rng(2).normal(size=(20, 3)), dtype)
    keys = jax.random.split(KEY, 20)
    invert = inverse_of(decoder, 3)
    found = jax.jit(jax.vmap(invert))(jax.vmap(decoder)(latents), keys)
    assert found.z.dtype == found.residual.dtype == dtype
    assert found.converged.all()
    np.testing.assert_allclose(found.z, latents, atol=error)
    assert found.residual.max() < residual
    # Alone, and without the outer jit.
    one = invert(decoder(latents[0]), keys[0])
    np.testing.assert_allclose(one.z, found.z[0], atol=error)
    plain = lid.invert(decoder, decoder(latents[0]), latent_shape=(3,), key=keys[0])
    np.testing.assert_allclose(plain.z, found.z[0], atol=error)


def test_a_rank_deficient_decoder_is_inverted_to_some_preimage(x64):
    decoder = mlp((8, 3, 16, 20))
    x = decoder(jnp.asarray(np.random.default_rng(0).normal(size=8)))
    found = inverse_of(decoder, 8)(x, KEY)
    assert found.converged
    assert found.residual < 1e-9
    assert lid.rank_by_gap(lid.decoder_spectrum(decoder, found.z)) == 3


@pytest.mark.parametrize("radius", [0.25, 1.0, 3.0])
def test_off_the_image_the_residual_is_the_distance(x64, radius):
    x = radius * jnp.array([2.0, -1.0, 2.0]) / 3
    for decoder, size in ((stereographic, 2), (direction, 3)):
        found = inverse_of(decoder, size)(x, KEY)
        assert found.converged
        np.testing.assert_allclose(found.residual, abs(radius - 1), atol=1e-5)
        np.testing.assert_allclose(decoder(found.z), x / radius, atol=1e-5)
        assert lid.rank_by_gap(lid.decoder_spectrum(decoder, found.z), floor=1e-4) == 2


def test_several_starts_escape_local_minima(x64):
    def winding(z):
        return jnp.concatenate([jnp.sin(4 * z), jnp.cos(3 * z), 0.2 * z])

    x = winding(jnp.array([1.3]))
    keys = jax.random.split(KEY, 30)

    def success(num_starts):
        invert = inverse_of(winding, 1, num_starts=num_starts)
        return np.asarray(jax.vmap(invert, (None, 0))(x, keys).residual) < 1e-8

    assert success(1).mean() < 0.6
    assert success(16).mean() > 0.9


def test_the_prior_makes_a_linear_inverse_the_posterior_mean(x64):
    matrix = linear((10, 6), [3.0, 1.0, 0.5, 0.1])
    x = jnp.asarray(np.random.default_rng(3).normal(size=10))
    weight = 0.2
    truth = jnp.linalg.solve(matrix.T @ matrix + weight * jnp.eye(6), matrix.T @ x)
    invert = inverse_of(lambda z: matrix @ z, 6, prior_weight=weight)
    found = invert(x, KEY)
    assert found.converged
    np.testing.assert_allclose(found.z, truth, atol=1e-8)
    np.testing.assert_allclose(found.residual, jnp.linalg.norm(matrix @ truth - x), rtol=1e-8)


def test_the_lowest_objective_is_kept_not_the_lowest_residual(x64):
    # Both z = 1 and z = 3 are minima; the image of 3 is nearer, but the prior prefers 1.
    def decoder(z):
        return (z - 1) * (z - 3) + 0.1 * z

    found = inverse_of(decoder, 1, prior_weight=1.0, num_starts=32)(jnp.zeros(1), KEY)
    grid = np.linspace(-5, 5, 200_001)
    objective = decoder(grid) ** 2 + grid**2
    np.testing.assert_allclose(found.z[0], grid[objective.argmin()], atol=1e-4)
    np.testing.assert_allclose(found.residual, abs(decoder(found.z[0])), rtol=1e-10)


@pytest.mark.parametrize("unit", [1e-3, 255.0])
def test_the_unit_of_the_data_does_not_matter(unit):
    decoder = mlp((3, 16, 20), dtype=jnp.float32)
    x = decoder(jnp.array([0.5, -1.0, 0.2]))
    plain = inverse_of(decoder, 3)(x, KEY)
    scaled = inverse_of(lambda z: unit * decoder(z), 3)(unit * x, KEY)
    assert plain.converged
    assert scaled.converged
    np.testing.assert_allclose(scaled.z, plain.z, atol=1e-5)
    assert scaled.residual < 1e-5 * unit


def test_failures_are_visible_and_do_not_win():
    decoder = mlp((3, 16, 20), dtype=jnp.float32)
    x = decoder(jnp.array([0.5, -1.0, 2.0]))
    stopped = inverse_of(decoder, 3, max_steps=2)(x, KEY)
    assert not stopped.converged
    assert jnp.isfinite(stopped.residual)

    def half(z):  # NaN for a start with z[0] < 0
        return jnp.where(z[0] < 0, jnp.nan, decoder(z))

    firsts = jax.random.normal(KEY, (8, 3))[:, 0]
    assert (firsts < 0).any()
    assert (firsts > 0).any()
    found = inverse_of(half, 3)(x, KEY)
    assert found.converged
    assert found.residual < 1e-5
    for broken in (
        inverse_of(lambda z: jnp.nan * decoder(z), 3)(x, KEY),
        inverse_of(decoder, 3)(x.at[0].set(jnp.nan), KEY),
    ):
        assert jnp.isnan(broken.residual)
        assert not broken.converged
    spectrum = lid.decoder_spectrum(lambda z: jnp.nan * decoder(z), jnp.ones(3))
    assert jnp.isnan(spectrum).all()


def test_images_and_matrices_as_points_and_latents(x64):
    matrix = linear((24, 6), np.ones(6))
    decoder = lambda z: (matrix @ z.reshape(-1)).reshape(3, 4, 2)  # noqa: E731
    z = jnp.arange(6.0).reshape(2, 3)
    found = lid.invert(decoder, decoder(z), latent_shape=(2, 3), key=KEY, num_starts=1)
    np.testing.assert_allclose(found.z, z, atol=1e-9)
    assert found.residual.shape == found.converged.shape == ()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    pytest.importorskip("flatbuffers")
    from jax import export

    decoder = mlp((3, 8, 6), dtype=jnp.float32)

    @jax.jit
    @jax.vmap
    def both(x):
        found = lid.invert(decoder, x, latent_shape=(3,), key=KEY)
        return found, lid.decoder_spectrum(decoder, found.z)

    # A kernel that JAX lowers to, without a promise that stored programs will find it later.
    stored = [export.DisabledSafetyCheck.custom_call("cusolver_ormqr_ffi")]
    program = export.export(both, platforms=[platform], disabled_checks=stored)(jnp.ones((4, 6)))
    assert program.platforms == (platform,)


# The boundary.


def double(z):
    return 2 * z


def pair(z):
    return z, z


def invert(decoder, x, **options):
    return lid.invert(decoder, x, **({"latent_shape": (3,), "key": KEY} | options))


THREE, COUNT = jnp.ones(3), jnp.ones(3, int)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lid.decoder_spectrum(double, COUNT), TypeError, r"\(z=.*int32.*Convert"),
        (lambda: lid.decoder_spectrum(pair, THREE), TypeError, r"(?s)one real array.*\[0\]"),
        (lambda: lid.decoder_spectrum(double, THREE, chunk_size=0), ValueError, "chunk_size=0"),
        (lambda: lid.rank_at_noise(COUNT, 0.1), TypeError, r"rank_at_noise\(singular_values="),
        (lambda: lid.rank_at_noise(THREE, 0.0), ValueError, r"rank_at_noise\(sigma=.*positive"),
        (lambda: invert(double, COUNT), TypeError, r"invert\(x=.*int32.*Convert"),
        (lambda: invert(double, jnp.ones((5, 3))), ValueError, r"\(5, 3\).*\(3,\).*jax\.vmap"),
        (lambda: invert(double, jnp.ones(4)), ValueError, r"\(4,\).*\(3,\).*Pass one point"),
        (lambda: invert(pair, THREE), TypeError, "one real array"),
        (lambda: invert(double, THREE, key=None), TypeError, "needs a key"),
        (lambda: invert(double, THREE, key=jax.random.PRNGKey(0)), TypeError, "typed key"),
        (lambda: invert(double, THREE, num_starts=0), ValueError, "num_starts=0.*at least 1"),
        (lambda: invert(double, THREE, max_steps=1.5), ValueError, "max_steps=1.5.*integer"),
        (
            lambda: invert(double, THREE, prior_weight=-1.0),
            ValueError,
            "prior_weight=-1.*squared",
        ),
    ],
)
def test_errors_name_argument_fault_and_cure(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_derivative_of_an_inverse_is_the_inverse_of_the_derivative(x64):
    mix = jnp.array([[1.0, 0.4], [-0.3, 1.2]])

    def decoder(z):
        return jnp.sinh(mix @ z) + 0.1 * (mix @ z) ** 3

    z = jnp.array([0.3, -0.6])
    x = decoder(z)

    def inverse(y):
        return lid.invert(decoder, y, latent_shape=(2,), key=jax.random.key(0), num_starts=4).z

    np.testing.assert_allclose(inverse(x), z, atol=1e-9)
    expected = jnp.linalg.inv(jax.jacfwd(decoder)(z))
    np.testing.assert_allclose(jax.jacfwd(inverse)(x), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jacrev(inverse)(x), expected, atol=1e-6)


def test_a_tolerance_is_a_tolerance(x64):
    def rosenbrock(z):
        return jnp.array([1 - z[0], 10 * (z[1] - z[0] ** 2)])

    def found(**options):
        return lid.invert(
            rosenbrock, jnp.zeros(2), latent_shape=(2,), key=jax.random.key(0), num_starts=1,
            **options,
        )  # fmt: skip

    tight = found()
    assert tight.residual < 1e-5
    assert found(atol=0.3).residual > 0.01
    eps = float(jnp.finfo(float).eps)
    same, loose = found(rtol=eps**0.75, atol=eps**0.75), found(rtol=eps**0.5, atol=eps**0.5)
    np.testing.assert_array_equal(tight.z, same.z)
    assert not np.array_equal(tight.z, loose.z)


def test_a_tiny_image_and_a_point_at_zero(x64):
    """The size of the data is then that of the decoder's image alone."""
    found = lid.invert(
        lambda z: 1e-7 * (z - 0.5), jnp.zeros(1), latent_shape=(1,), key=jax.random.key(0)
    )
    np.testing.assert_allclose(found.z, 0.5, atol=1e-6)
    assert found.converged


def test_the_best_start_says_whether_it_converged(x64):
    # A bowl whose bottom is .7 high, and a valley that goes down for ever.
    def bowl(z):
        return jnp.sqrt(0.5 + (z + 0.5) ** 2)

    def decoder(z):
        return jnp.where(z < 0, bowl(z), 0.4 / (1 + jnp.abs(z)))

    keys = [jax.random.key(i) for i in range(40)]
    starts = [jax.random.normal(key, (2, 1))[:, 0] for key in keys]
    key = next(k for k, s in zip(keys, starts, strict=True) if s.min() < -0.3 and s.max() > 0.3)
    options = {"latent_shape": (1,), "key": key, "num_starts": 2, "max_steps": 100}
    assert lid.invert(bowl, jnp.zeros(1), **options).converged
    found = lid.invert(decoder, jnp.zeros(1), **options)
    assert found.residual < 0.3  # in the valley, although the start in the bowl did converge
    assert not found.converged


@pytest.mark.parametrize("weight", [float("nan"), np.float32(-1), jnp.ones(3)])
def test_a_prior_weight_is_one_number_of_at_least_zero(weight):
    with pytest.raises(ValueError, match="must be one number, 0 or positive"):
        lid.invert(
            lambda z: z, jnp.ones(2), latent_shape=(2,), key=jax.random.key(0), prior_weight=weight
        )


def test_a_traced_weight_below_zero_is_nan_and_zero_has_a_derivative():
    def found(weight):
        return lid.invert(
            lambda z: 2 * z,
            jnp.ones(2),
            latent_shape=(2,),
            key=jax.random.key(0),
            prior_weight=weight,
        )

    assert jnp.isnan(jax.jit(found)(-1.0).residual)
    assert jnp.all(jnp.isfinite(jax.jacfwd(lambda weight: found(weight).z)(0.0)))
