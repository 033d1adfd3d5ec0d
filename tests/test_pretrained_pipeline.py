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

from mmh_jax import lid, linalg, noise, sample
from mmh_jax.denoise import Guided
from mmh_jax.pretrained import (
    ClassConditional,
    StableDiffusion,
    StableDiffusion3,
    TextToImage,
    Unconditional,
    load,
)

FIXTURE = load_file(Path(__file__).parent / "data" / "pretrained" / "pipeline.safetensors")
TIME = 250


@pytest.fixture
def copied(published, tmp_path):
    """A copy of a folder, to be damaged."""
    return lambda kind: Path(shutil.copytree(published(kind), tmp_path / kind))


def close(found, expected, tolerance=1e-3):
    assert np.abs(np.asarray(found) - expected).max() < tolerance * np.abs(expected).max()


slow = pytest.mark.slow
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
answer = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))
quick_answer = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma), compiler_options=QUICK)


def draws_what_diffusers_draws(model, kind, asked):
    noises = folders.noise(kind)
    for place, each in enumerate(asked):
        latents = model.sample(
            each, noise=noises[place : place + 1], num_steps=folders.STEPS,
            guidance_scale=folders.SCALE,
        )  # fmt: skip
        close(latents[0], FIXTURE[f"{kind}.latents"][place])
        if place == 0:
            assert np.abs(model.decode(latents[0]) - FIXTURE[f"{kind}.image"]).max() < 1e-3
    # Another prompt, or none, is another picture.
    assert np.abs(FIXTURE[f"{kind}.latents"][0] - FIXTURE[f"{kind}.latents"][1]).max() > 0.1


@pytest.mark.parametrize(
    "kind", ["sd1", "sd3", *(pytest.param(k, marks=slow) for k in ("sd2", "xl"))]
)
def test_latents_and_images_are_those_of_diffusers(loaded, kind):
    model = loaded(kind)
    assert isinstance(model, TextToImage)
    assert type(model) is (StableDiffusion3 if kind == "sd3" else StableDiffusion)
    assert model.shape == (8, 8, 16 if kind == "sd3" else 4)
    assert model.image_shape == (16, 16, 3)
    draws_what_diffusers_draws(model, kind, folders.PROMPTS)


def test_latents_and_images_of_dit_are_those_of_diffusers(loaded):
    model = loaded("dit")
    assert isinstance(model, ClassConditional)
    assert model.shape == (8, 8, 4)
    assert model.image_shape == (16, 16, 3)
    draws_what_diffusers_draws(model, "dit", ["golden retriever", folders.LABELS[1]])
    # The class counts, in these networks of noise, too.
    noise = folders.noise("dit")[:1]
    other = model.sample(5, noise=noise, num_steps=folders.STEPS, guidance_scale=folders.SCALE)
    assert np.abs(other[0] - FIXTURE["dit.latents"][0]).max() > 1


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


def test_classes_are_bound_as_conditions(loaded):
    model = loaded("dit")
    x, sigma = jnp.asarray(folders.noise("dit")[0]), 1.3
    named, null = model.denoiser("golden retriever"), model.denoiser()
    assert null.cond is None
    np.testing.assert_array_equal(named.cond, 207)
    away = model.denoiser(207, 3.0)
    assert isinstance(away, Guided)
    assert away.guidance_scale == 3
    d_null, d_cond = (quick_answer(each, x, sigma) for each in (null, null.condition(207)))
    assert np.abs(d_cond - d_null).max() > 1e-3
    np.testing.assert_allclose(quick_answer(null.condition(1000), x, sigma), d_null, atol=1e-5)
    np.testing.assert_allclose(quick_answer(away, x, sigma), 3 * d_cond - 2 * d_null, atol=1e-3)


def test_classes_by_name(loaded):
    model = loaded("dit")
    assert model.labels[0] == "tench, Tinca tinca"
    assert model.num_classes == 1000
    names = ("tench", "Tinca tinca", "tench, Tinca tinca", "golden retriever", np.int64(999))
    assert [model.index(name) for name in names] == [0, 0, 0, 207, 999]
    for label, error, message in [
        (1000, ValueError, r"label=1000.*0 to 999, and None"),
        (-1, ValueError, "label=-1"),
        ("crane", ValueError, "classes 134, 517"),
        ("dog", ValueError, "'dog'.*no name in `labels`, such as 'tench"),
        (2.5, TypeError, "is a float"),
        (True, TypeError, "is a bool"),
        ([1, 2], TypeError, "is a list"),
    ]:
        with pytest.raises(error, match=message):
            model.denoiser(label)
    with pytest.raises(ValueError, match=r"noise=.*has shape"):
        model.sample(3, noise=np.zeros((8, 8, 4)))
    with pytest.raises(TypeError, match="needs a key"):
        model.sample(3)


@pytest.mark.parametrize(("kind", "asked"), [("dit", 3), ("sd3", folders.PROMPTS[0])])
def test_flipd_of_transformers_is_finite(loaded, kind, asked):
    model = loaded(kind)
    x, denoiser = jnp.asarray(folders.noise(kind)[0]), model.denoiser(asked)
    trace, key = linalg.rademacher(8), jax.random.key(0)
    measured = jax.jit(
        lambda denoiser: lid.flipd(denoiser, x, 0.5, trace=trace, key=key), compiler_options=QUICK
    )
    found = measured(denoiser)
    assert found.value.shape == ()
    assert np.isfinite(found.value)
    assert np.isfinite(found.stderr)
    assert not found.outside_training


def test_the_condition_of_stable_diffusion_3(loaded):
    model = loaded("sd3")
    context, pooled = model.embed(folders.PROMPTS[0])
    assert context.shape == (77 + 256, 32)
    assert pooled.shape == (24,)
    assert not np.any(context[77:])  # of T5
    assert not np.any(context[:, 28:])
    assert np.all(np.any(context[:77, :28], axis=0))
    for null, empty in zip(model.embed(None), model.embed(""), strict=True):
        np.testing.assert_array_equal(null, empty)
    with pytest.raises(ValueError, match="multiples of 4"):  # a patch is 2 x 2
        model.resized(16, 18)
    wide = model.resized(16, 24)
    assert wide.shape == (8, 12, 16)
    assert jax.eval_shape(wide.denoiser(), jnp.zeros(wide.shape), 1.0).shape == wide.shape
    image = np.random.default_rng(0).uniform(size=(16, 16, 3)).astype(np.float32)
    assert model.encode(image).shape == (8, 8, 16)


def test_t5_is_refused_or_skipped(copied):
    folder = copied("sd3")
    edited(
        folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"],
        tokenizer_3=["transformers", "T5TokenizerFast"],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"T5, which is not read here.*skip_t5=True.*without it"):
        load(folder)
    assert isinstance(load(folder, skip_t5=True), StableDiffusion3)


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
@pytest.mark.parametrize("kind", ["sd1", "sd3", "dit"])
def test_in_bfloat16(published, kind):
    single, half = (load(published(kind), dtype=dtype) for dtype in ("float32", "bfloat16"))
    x, asked = jnp.asarray(folders.noise(kind)[0]), 3 if kind == "dit" else folders.PROMPTS[0]
    one, other = (answer(each.denoiser(asked), x, 2.0) for each in (single, half))
    leaves = jax.tree.leaves((half.denoiser(asked).params, half.vae[1]))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
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


def without_projection(folder):
    edited(folder / "text_encoder_2/config.json", architectures=["CLIPTextModel"])
    without(folder / "text_encoder_2/model.safetensors", "text_projection.weight")


INDEX = "model_index.json"


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("dit", lambda f: shutil.rmtree(f / "transformer"), r"transformer'\)` does not exist"),
        ("dit", lambda f: edited(f / INDEX, transformer=None), "names no transformer"),
        ("dit", lambda f: edited(f / INDEX, transformer=["diffusers", "Evil"]), "'Evil'"),
        ("dit", lambda f: edited(f / INDEX, vae=None), "names no vae"),
        ("dit", lambda f: edited(f / INDEX, id2label={"1000": "x"}), 'id2label.*"0" to "999"'),
        ("dit", lambda f: edited(f / INDEX, id2label={"1": 2}), "id2label"),
        ("dit", lambda f: edited(f / INDEX, id2label=["tench"]), "id2label"),
        ("sd3", lambda f: edited(f / INDEX, text_encoder_2=None), "names no text_encoder_2"),
        ("sd3", lambda f: shutil.rmtree(f / "tokenizer_2"), r"tokenizer_2'\)` does not exist"),
        ("sd3", without_projection, "28 wide and project to 12.*at most 32, and 24"),
    ],
)
def test_a_damaged_folder_of_a_transformer_is_refused_by_name(copied, kind, damage, message):
    folder = copied(kind)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(folder)


@slow
def test_a_folder_without_names_of_classes(copied):
    folder = copied("dit")
    edited(folder / INDEX, id2label=None)
    with pytest.raises(ValueError, match="the folder has none"):
        load(folder).denoiser("tench")


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
