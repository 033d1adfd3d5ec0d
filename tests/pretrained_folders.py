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
}  # fmt: skip
PROMPTS = ["a painting of the sea", "The DOG isn't sleeping!"]
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
    """The folder of `sd1`, `sd2`, `xl` or `ddpm`."""
    folder = Path(folder)
    scheduler = folder / "scheduler"
    scheduler.mkdir(parents=True)
    (scheduler / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[kind]))
    index = {"_diffusers_version": "0.30.0", "scheduler": ["diffusers", "DDIMScheduler"]}
    if kind == "ddpm":
        config = cases.UNETS["ddpm"] | {"_class_name": "UNet2DModel", "in_channels": 3}
        component(folder / "unet", config, pretrained.UNet2DModel)
        index |= {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder
    is_xl = kind == "xl"
    unet = UNET | (XL if is_xl else {}) | {"_class_name": "UNet2DConditionModel"}
    component(folder / "unet", unet, pretrained.UNet2DConditionModel)
    component(folder / "vae", VAE | {"_class_name": "AutoencoderKL"}, pretrained.AutoencoderKL)
    parts = [("", 16, "CLIPTextModel"), ("_2", 12, "CLIPTextModelWithProjection")]
    for end, width, name in parts[: 1 + is_xl]:
        size = tokenizer(folder / f"tokenizer{end}", "!" if kind == "sd2" or end else None)
        component(
            folder / f"text_encoder{end}", text_config(size, width, name),
            pretrained.CLIPTextModel, "model",
        )  # fmt: skip
        index[f"text_encoder{end}"] = ["transformers", name]
        index[f"tokenizer{end}"] = ["transformers", "CLIPTokenizer"]
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if is_xl:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    else:
        index |= {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
        index |= {"feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def noise(kind):
    """Of unit variance, for each prompt."""
    shape = (8, 8, 3) if kind == "ddpm" else (8, 8, 4)
    return cases.draw(f"{kind}.noise", (len(PROMPTS), *shape))
