"""Whole published folders: samples as diffusers draws them, FLIPD as PyTorch computes it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_folders as folders
import pytest
from safetensors.numpy import load_file, save_file

from mmh_jax import lid, noise, sample
from mmh_jax.pretrained import StableDiffusion, Unconditional, load

FIXTURE = load_file(Path(__file__).parent / "data" / "pretrained" / "pipeline.safetensors")
TIME = 250


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of each kind, written once."""
    root, there = tmp_path_factory.mktemp("published"), {}

    def find(kind):
        if kind not in there:
            there[kind] = folders.write(kind, root / kind)
        return there[kind]

    return find


@pytest.fixture
def copied(published, tmp_path):
    """A copy of a folder, to be damaged."""
    return lambda kind: Path(shutil.copytree(published(kind), tmp_path / kind))


def close(found, expected, tolerance=1e-3):
    assert np.abs(np.asarray(found) - expected).max() < tolerance * np.abs(expected).max()


slow = pytest.mark.slow
answer = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))


@pytest.mark.parametrize("kind", ["sd1", *(pytest.param(k, marks=slow) for k in ("sd2", "xl"))])
def test_latents_and_images_are_those_of_diffusers(published, kind):
    model = load(published(kind))
    assert isinstance(model, StableDiffusion)
    assert model.shape == (8, 8, 4)
    assert model.image_shape == (16, 16, 3)
    noises = folders.noise(kind)
    for place, prompt in enumerate(folders.PROMPTS):
        latents = model.sample(
            prompt, noise=noises[place : place + 1], num_steps=folders.STEPS,
            guidance_scale=folders.SCALE,
        )  # fmt: skip
        close(latents[0], FIXTURE[f"{kind}.latents"][place])
        if place == 0:
            assert np.abs(model.decode(latents[0]) - FIXTURE[f"{kind}.image"]).max() < 1e-3
    # Another prompt, or none, is another picture.
    assert np.abs(FIXTURE[f"{kind}.latents"][0] - FIXTURE[f"{kind}.latents"][1]).max() > 0.1


def test_an_unconditional_model_draws_what_diffusers_draws(published):
    model = load(published("ddpm"))
    assert isinstance(model, Unconditional)
    found = model.sample(noise=folders.noise("ddpm"), num_steps=folders.STEPS, step=sample.ddim())
    expected = np.clip((FIXTURE["ddpm.latents"] + 1) / 2, 0, 1)
    assert np.abs(np.asarray(found) - expected).max() < 1e-3
    assert model.denoiser().shape == (8, 8, 3)
    np.testing.assert_allclose(model.decode(model.encode(expected[0])), expected[0], atol=1e-6)


@slow
def test_an_unconditional_model_draws_by_noise_of_its_own(published):
    model = load(published("ddpm"))
    drawn = model.sample(3, key=jax.random.key(0), num_steps=4, chunk_size=2)
    assert drawn.shape == (3, 8, 8, 3)
    assert len(np.unique(np.asarray(drawn).reshape(3, -1), axis=0)) == 3


def test_flipd_is_that_of_pytorch_on_the_right_schedule(published):
    model = load(published("sd1"))
    denoiser = model.denoiser(folders.PROMPTS[0])
    alpha, s = model.process.schedule(TIME)
    x = folders.noise("sd1")[0] / float(alpha)
    measured = jax.jit(lambda denoiser, sigma: lid.flipd(denoiser, x, sigma).value)
    found, expected = float(measured(denoiser, s / alpha)), FIXTURE["sd1.flipd"][0]
    assert abs(found - expected) < 1e-5 * abs(expected)
    # The mistake in print: the same network read on the linear schedule, on which this noise level
    # is that of another time.
    wrong = denoiser.replace(schedule=noise.ddpm_linear(1000, 0.00085, 0.012))
    mistaken = float(measured(wrong, s / alpha))
    assert abs(mistaken - expected) > 1e-3 * abs(expected)  # little, in a network of noise


def test_conditions_are_bound_as_everywhere(published):
    model = load(published("sd1"))
    x, sigma = jnp.asarray(folders.noise("sd1")[0]), 1.3
    prompt, other = folders.PROMPTS
    null, cond = model.denoiser().condition(model.embed("")), model.denoiser(prompt)
    d_null, d_cond = (answer(each, x, sigma) for each in (null, cond))
    d_other = answer(null.condition(model.embed(other)), x, sigma)
    away = model.denoiser(prompt, 3.0, other)
    assert away.guidance_scale == 3
    np.testing.assert_allclose(answer(away.conditional, x, sigma), d_cond, atol=1e-5)
    # Without a condition it is the empty prompt, or what guidance leads away from.
    np.testing.assert_allclose(answer(model.denoiser(), x, sigma), d_null, atol=1e-5)
    np.testing.assert_allclose(answer(away.unconditional, x, sigma), d_other, atol=1e-5)
    assert np.abs(d_cond - d_null).max() > 1e-3
    assert cond.condition(None).cond is None


def test_images_to_latents_and_other_sizes(published):
    model = load(published("sd1"))
    image = np.random.default_rng(0).uniform(size=(16, 16, 3)).astype(np.float32)
    latent = model.encode(image)
    assert latent.shape == (8, 8, 4)
    drawn = [model.encode(image, key=jax.random.key(seed)) for seed in range(2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0
    assert np.all((model.decode(latent) >= 0) & (model.decode(latent) <= 1))
    wide = model.resized(16, 32)
    assert wide.shape == (8, 16, 4)
    assert jax.eval_shape(wide.denoiser(), jnp.zeros(wide.shape), 1.0).shape == wide.shape
    with pytest.raises(ValueError, match="multiples of 2"):
        model.resized(15, 16)
    with pytest.raises(ValueError, match="one image"):
        model.encode(image[None])
    with pytest.raises(ValueError, match=r"noise=.*has shape"):
        model.sample(None, noise=np.zeros((8, 8, 4)))
    with pytest.raises(TypeError, match="needs a key"):
        model.sample(None)
    with pytest.raises(TypeError, match="pass `key=`"):
        model.sample(None, noise=np.zeros((1, 8, 8, 4)), step=sample.ancestral())


def test_without_a_prompt_xl_is_given_zeros(published):
    model = load(published("xl"))
    null, empty = model.embed(None), model.embed("")
    assert not np.any(null.context)
    assert not np.any(null.text_embeds)
    assert np.any(empty.context)
    np.testing.assert_array_equal(null.time_ids, [16, 16, 0, 0, 16, 16])


@slow
def test_in_bfloat16(published):
    single, half = (load(published("sd1"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.unet[1])} == {"bfloat16"}
    x = jnp.asarray(folders.noise("sd1")[0])
    one, other = (answer(each.denoiser(folders.PROMPTS[0]), x, 2.0) for each in (single, half))
    assert other.dtype == jnp.float32
    assert 0 < np.abs(one - other).max() < 0.1 * np.abs(one).max()


def test_old_folders_have_the_files_of_one_network_beside_the_index(copied):
    folder = copied("ddpm")
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    assert load(folder).shape == (8, 8, 3)


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path, name):
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), r"model_index\.json'\)` does not exist"),
        (lambda f: (f / "model_index.json").write_text("{"), "is no JSON"),
        (lambda f: edited(f / "model_index.json", _class_name="FluxPipeline"), "'FluxPipeline'"),
        (lambda f: edited(f / "model_index.json", unet=[None, None]), "names no unet"),
        (lambda f: edited(f / "model_index.json", unet=["diffusers", "Evil"]), "'Evil'"),
        (lambda f: edited(f / "model_index.json", text_encoder=None), "names no text_encoder"),
        (lambda f: shutil.rmtree(f / "vae"), r"vae'\)` does not exist"),
        (lambda f: edited(f / "unet/config.json", sample_size="big"), "sample_size"),
        (lambda f: edited(f / "unet/config.json", down_block_types=["X", "Y"]), "'X'"),
        (lambda f: edited(f / "unet/config.json", block_out_channels=[8, 8]), "has shape"),
        (lambda f: without(f / UNET, "conv_in.weight"), r"missing: conv_in\.weight"),
        (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-9]), "is truncated"),
        (
            lambda f: (f / UNET).rename(f / "unet" / "diffusion_pytorch_model.bin"),
            "is a pickle, which can run any program",
        ),
        (
            lambda f: edited(f / "scheduler/scheduler_config.json", _class_name="Euler"),
            "'Euler', which is not read here",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_name(copied, damage, message):
    folder = copied("sd1")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(folder)


def test_a_component_that_is_a_link_out_of_the_folder_is_refused(copied, tmp_path):
    folder = copied("ddpm")
    (folder / "unet").rename(tmp_path / "elsewhere")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of its folder"):
        load(folder)


_SHARDED = """
import sys, jax, numpy as np
from mmh_jax.pretrained import load
mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
plain, spread = load(sys.argv[1]), load(sys.argv[1], mesh=mesh)
leaves = jax.tree.leaves(spread.model.params)
assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
x = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
of = jax.jit(lambda model, x: model(x, 1.0))
print(float(np.abs(of(plain.denoiser(), x) - of(spread.denoiser(), x)).max()))
"""


@slow
def test_parameters_are_divided_over_a_mesh(published):
    import os

    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _SHARDED, str(published("ddpm"))],
        env=os.environ | flags, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@slow
@pytest.mark.parametrize("kind", folders.SCHEDULERS)
def test_the_fixture_is_what_diffusers_says_now(published, kind):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import make_pipeline

    for name, array in make_pipeline.answers(kind, published(kind)).items():
        close(array, FIXTURE[f"{kind}.{name}"], 1e-4)
    if kind == "sd1":
        assert make_pipeline.flipd(published(kind)) == pytest.approx(FIXTURE["sd1.flipd"][0])
