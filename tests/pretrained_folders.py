"""Tiny pipelines as folders of published files, with weights that NumPy draws."""

import json
import sys
from pathlib import Path

import pretrained_cases as cases
from flax import nnx
from safetensors.numpy import save_file

from mmh_jax import pretrained

sys.path.insert(0, str(Path(__file__).parent / "data" / "pretrained"))

import make_tokenizer

UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 16,
    "attention_head_dim": 2,
}  # fmt: skip
XL = {
    "cross_attention_dim": 28, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36, "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2],
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 16], "norm_num_groups": 4, "sample_size": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "scaling_factor": 0.18215,
}  # fmt: skip
DIT = {
    "_class_name": "Transformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8,
    "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "attention_bias": True,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
}  # fmt: skip
NAMES = {"0": "tench, Tinca tinca", "134": "crane", "207": "golden retriever", "517": "crane"}
SD3 = {
    "_class_name": "SD3Transformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8,
    "in_channels": 16, "out_channels": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "pos_embed_max_size": 6, "caption_projection_dim": 16, "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
}  # fmt: skip
SD3_VAE = VAE | {
    "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SCALED = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "num_train_timesteps": 1000, "clip_sample": False, "steps_offset": 1,
}  # fmt: skip
SCHEDULERS = {
    "sd1": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, **SCALED},
    "sd2": {
        "_class_name": "DDIMScheduler", "prediction_type": "v_prediction",
        "set_alpha_to_one": True, **SCALED,
    },
    "xl": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, **SCALED},
    "ddpm": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "dit": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": True},
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}  # fmt: skip
PROMPTS = ["a painting of the sea", "The DOG isn't sleeping!"]
LABELS = [207, 3]
STEPS, SCALE = 10, 7.5


def text_config(vocabulary, width, kind):
    config = {
        "architectures": [kind], "model_type": "clip_text_model", "vocab_size": vocabulary,
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 77, "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu", "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
    }  # fmt: skip
    return config | ({"projection_dim": 12} if kind.endswith("Projection") else {})


def component(folder, config, build, name="diffusion_pytorch_model"):
    """One network's files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    layout = pretrained.layout(pretrained.abstract(lambda: build(config, rngs=nnx.Rngs(0))))
    save_file(cases.weights(layout), folder / f"{name}.safetensors", {"format": "pt"})


def tokenizer(folder, pad=None):
    folder.mkdir(parents=True)
    vocab, merges = made()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = "\n".join(" ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
    config = make_tokenizer.CONFIG | ({} if pad is None else {"pad_token": pad})
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "CLIPTokenizer"})
    )
    return len(vocab)


def made():
    names = make_tokenizer.byte_names()
    merges = make_tokenizer.trained(lambda word: [names[byte] for byte in word.encode()], 60)
    return make_tokenizer.vocabulary(merges), merges


def write(kind, folder):
    """The folder of one of `SCHEDULERS`."""
    folder = Path(folder)
    scheduler, config = folder / "scheduler", SCHEDULERS[kind]
    scheduler.mkdir(parents=True)
    (scheduler / "scheduler_config.json").write_text(json.dumps(config))
    index = {"_diffusers_version": "0.30.0", "scheduler": ["diffusers", config["_class_name"]]}
    index |= {"ddpm": unconditional, "dit": class_conditional, "sd3": stable_diffusion_3}.get(
        kind, stable_diffusion
    )(kind, folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def unconditional(kind, folder):
    config = cases.UNETS[kind] | {"_class_name": "UNet2DModel", "in_channels": 3}
    component(folder / "unet", config, pretrained.UNet2DModel)
    return {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}


def autoencoder(folder, config=VAE):
    component(folder / "vae", config | {"_class_name": "AutoencoderKL"}, pretrained.AutoencoderKL)
    return {"vae": ["diffusers", "AutoencoderKL"]}


def texts(folder, parts):
    """Tokenizers and encoders; parts are (end of the name, width, class, padding)."""
    index = {}
    for end, width, name, pad in parts:
        size = tokenizer(folder / f"tokenizer{end}", pad)
        component(
            folder / f"text_encoder{end}", text_config(size, width, name),
            pretrained.CLIPTextModel, "model",
        )  # fmt: skip
        index[f"text_encoder{end}"] = ["transformers", name]
        index[f"tokenizer{end}"] = ["transformers", "CLIPTokenizer"]
    return index


def stable_diffusion(kind, folder):
    is_xl = kind == "xl"
    unet = UNET | (XL if is_xl else {}) | {"_class_name": "UNet2DConditionModel"}
    component(folder / "unet", unet, pretrained.UNet2DConditionModel)
    index = {"unet": ["diffusers", "UNet2DConditionModel"]} | autoencoder(folder)
    parts = [("", 16, "CLIPTextModel", "!" if kind == "sd2" else None)]
    if is_xl:
        parts += [("_2", 12, "CLIPTextModelWithProjection", "!")]
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    else:
        index |= {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
        index |= {"feature_extractor": [None, None], "requires_safety_checker": False}
    return index | texts(folder, parts)


def class_conditional(kind, folder):
    component(folder / "transformer", DIT, pretrained.DiTTransformer2DModel)
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "Transformer2DModel"]}
    return index | autoencoder(folder) | {"id2label": NAMES}


def stable_diffusion_3(kind, folder):
    component(folder / "transformer", SD3, pretrained.SD3Transformer2DModel)
    index = {"_class_name": "StableDiffusion3Pipeline"}
    index |= {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    name = "CLIPTextModelWithProjection"
    parts = [("", 16, name, None), ("_2", 12, name, "!")]
    return index | autoencoder(folder, SD3_VAE) | texts(folder, parts)


def noise(kind):
    """Of unit variance, for each prompt or label."""
    channels = {"ddpm": 3, "sd3": 16}.get(kind, 4)
    return cases.draw(f"{kind}.noise", (len(PROMPTS), 8, 8, channels))
