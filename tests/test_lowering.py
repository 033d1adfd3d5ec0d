"""Every estimator that looks at a model lowers for accelerators, and is the same on 8 devices.

Lowering needs no accelerator: `jax.export` makes the program that one would compile, and fails
where an operation has no rule there.  It also refuses custom calls whose stored programs later
versions need not find; none of the estimators here has one (`lid.invert` has: see its tests), and
host callbacks, by which Diffrax checks its arguments (hence no `sample.log_density`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmh_jax import denoise, lid, linalg, mapping, noise

DIM, WIDTH, NUM = 8, 16, 11  # above the products of the sketches; 11 points on 8 devices
SIGMA = 0.3


def network(params, x_t, t):
    first, last = params
    return jnp.matmul(last, jnp.tanh(jnp.matmul(first, jnp.append(x_t, t))))


def model():
    rng = np.random.default_rng(0)
    params = (rng.normal(size=(WIDTH, DIM + 1)) / 3, rng.normal(size=(DIM, WIDTH)) / 4)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return denoise.NetworkDenoiser(params, noise.VP(), apply=network, shape=(DIM,))


def flipd_with(trace):
    return lambda model, x, *, key: lid.flipd(model, x, SIGMA, trace=trace, key=key)


def rebuilt(space):
    """The matrix, for eigenvectors have no sign, and near a repeated eigenvalue no direction."""
    scaled = space.eigenvalues[:, None] * space.directions
    return space.eigenvalues, jnp.matmul(space.directions.T, scaled, precision="highest")


LEVELS = jnp.array([0.2, 0.4, 0.8])
ESTIMATORS = {
    "exact": flipd_with(linalg.exact(3)),
    "rademacher": flipd_with(linalg.rademacher(4)),
    "hutchpp": flipd_with(linalg.hutchpp(6)),
    "xtrace": flipd_with(linalg.xtrace(6)),
    "positive_exact": flipd_with(linalg.positive_exact()),
    "positive_lanczos": flipd_with(linalg.positive_lanczos(2, 4)),
    "function_lanczos": flipd_with(linalg.function_lanczos(jnp.square, 2, 4)),
    "flipd_curve": lambda model, x, *, key: lid.flipd_curve(model, x, LEVELS),
    "lidl": lambda model, x, *, key: lid.lidl(lid.flipd_curve(model, x, LEVELS)),
    "richardson": lambda model, x, *, key: lid.richardson(model, x, SIGMA),
    "richardson, projected": lambda model, x, *, key: lid.richardson(
        model, x, SIGMA, trace=linalg.positive_exact()
    ),
    "denoising_loss": lambda model, x, *, key: lid.denoising_loss(
        model, x, SIGMA, key=key, num_samples=8
    ),
    "denoised_spread": lambda model, x, *, key: lid.denoised_spread(
        model, x, SIGMA, key=key, num_samples=8
    ),
    "jacobian_spectrum": lambda model, x, *, key: lid.jacobian_spectrum(model, x, SIGMA),
    "spectral_curve": lambda model, x, *, key: lid.spectral_curve(
        model, x, SIGMA * jnp.array([1.0, 2.0])
    ),
    "tangent_space": lambda model, x, *, key: rebuilt(lid.tangent_space(model, x, SIGMA)),
    "soft_rank_lanczos": lambda model, x, *, key: lid.soft_rank_lanczos(
        model, x, SIGMA, num_probes=2, order=4, key=key
    ),
    "normal_bundle_spectrum": lambda model, x, *, key: lid.normal_bundle_spectrum(
        model, x, SIGMA, key=key
    ),
    "decoder_spectrum": lambda model, z, *, key: lid.decoder_spectrum(lambda z: model(z, SIGMA), z),
}


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(name, platform):
    pytest.importorskip("flatbuffers")
    from jax import export

    def many(model, points, keys):
        return jax.vmap(lambda x, key: ESTIMATORS[name](model, x, key=key))(points, keys)

    keys = jax.random.split(jax.random.key(0), 2)
    program = export.export(jax.jit(many), platforms=[platform])(model(), jnp.ones((2, DIM)), keys)
    assert program.platforms == (platform,)


@pytest.mark.spread(3)
# Without those whose computation is that of another.
@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"function_lanczos", "lidl"}))
def test_eight_devices_give_what_one_gives(name):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; XLA_FLAGS was set to fewer")
    mesh = jax.make_mesh((8,), ("points",), axis_types=(jax.sharding.AxisType.Auto,))
    points = np.random.default_rng(1).normal(size=(NUM, DIM)).astype(np.float32)
    one, eight = (
        mapping.over_points(ESTIMATORS[name], (None, 0), chunk_size=chunk_size, mesh=placed)(
            model(), points, key=jax.random.key(1)
        )
        for chunk_size, placed in ((NUM, None), (2, mesh))
    )
    for alone, spread in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert alone.shape[0] == NUM
        assert np.all(np.isfinite(alone))
        # Relative to the largest entry: an eigenvalue near 0 is rounded like one near 1.
        np.testing.assert_allclose(
            spread, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max(initial=0)
        )


def spectrum_of(rule):
    return lambda offsets: rule(lid.local_spectrum(offsets))


OF_NEIGHBORS = {
    "mle": lid.mle,
    "mom": lid.mom,
    "mada": lid.mada,
    "tle": lid.tle,
    "abid": lid.abid,
    "ess": lid.ess,
    "local_pca": spectrum_of(lid.fukunaga_olsen),
    "minka": spectrum_of(lambda s: lid.minka(s, num_samples=12, ambient_dim=DIM)),
    "two_nn": lambda offsets: lid.two_nn(lid.pair_distances(offsets)),
    "gride": lambda offsets: lid.gride(lid.pair_distances(offsets)),
    "takens": lambda offsets: lid.takens(lid.pair_distances(offsets)),
    "fisher_s": lambda offsets: lid.fisher_s(offsets).value,
}
OF_DISTANCES = {"mle", "mom", "mada"}


@pytest.mark.spread(5)
@pytest.mark.parametrize("name", OF_NEIGHBORS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_estimators_of_data_lower_for_accelerators(name, platform):
    pytest.importorskip("flatbuffers")
    from jax import export

    shape = (2, 12) if name in OF_DISTANCES else (2, 12, DIM)
    mapped = jax.jit(jax.vmap(OF_NEIGHBORS[name]))
    program = export.export(mapped, platforms=[platform])(jnp.ones(shape))
    assert program.platforms == (platform,)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_search_for_neighbours_lowers_for_accelerators(platform, monkeypatch):
    pytest.importorskip("flatbuffers")
    from jax import export

    from mmh_jax.lid import closed_form, neighbor_search

    monkeypatch.setattr(
        neighbor_search, "over_points", lambda find, in_axes, **_: jax.vmap(find, in_axes)
    )
    points = np.ones((40, DIM), np.float32)
    space = neighbor_search.space_of(points, np.zeros(DIM), 16, 3, 1.0)
    space = neighbor_search.with_sides(space, 3)
    own = np.arange(5, dtype=np.int32)
    for find in (
        neighbor_search.by_filter.__wrapped__(3, 20, 5, None),
        neighbor_search.by_difference.__wrapped__(3, None),
    ):
        program = export.export(jax.jit(find), platforms=[platform])(space, points[:5], own)
        assert program.platforms == (platform,)
    levels = np.array([0.1, 0.2], np.float32)
    curve = jax.vmap(closed_form._at_one, (None, None, None, 0, 0))
    program = export.export(jax.jit(curve), platforms=[platform])(
        space.blocks, space.num_points, levels, points[:5], own
    )
    assert program.platforms == (platform,)
