"""Small configurations of published networks, their weights and inputs drawn by NumPy: the same for
the Flax networks, for the PyTorch ones, and for the fixtures that `data/pretrained/make.py` wrote.
"""

import zlib

import numpy as np

UNETS = {
    "ddpm": {
        "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False,
        "freq_shift": 1, "norm_eps": 1e-6, "sample_size": 8,
    },
    "shifted": {
        "block_out_channels": [8, 12], "layers_per_block": 1, "norm_num_groups": 2,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"], "num_class_embeds": 5,
        "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift",
        "center_input_sample": True, "mid_block_scale_factor": 1.5,
    },
    "resnets": {
        "block_out_channels": [8, 8], "layers_per_block": 2, "norm_num_groups": 4,
        "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "UpBlock2D"], "add_attention": False,
        "class_embed_type": "timestep", "act_fn": "mish", "in_channels": 2, "out_channels": 4,
    },
    "ncsnpp": {
        "block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": None,
        "down_block_types": ["AttnSkipDownBlock2D", "SkipDownBlock2D"],
        "up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D"],
        "time_embedding_type": "fourier", "mid_block_scale_factor": 1.41421356,
        "attention_head_dim": None, "norm_eps": 1e-6, "center_input_sample": False,
    },
    "learned": {
        "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"], "downsample_type": "resnet",
        "upsample_type": "resnet", "attention_head_dim": 8, "attn_norm_num_groups": 2,
        "resnet_time_scale_shift": "scale_shift", "class_embed_type": "identity",
        "time_embedding_dim": 12, "time_embedding_type": "learned", "num_train_timesteps": 20,
    },
    "old": {
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        "up_block_types": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"], "mid_block_type": None,
        "act_fn": "gelu", "in_channels": 1, "out_channels": 2,
    },
}  # fmt: skip

CONDITIONAL = {
    "sd1": {
        "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 2, "cross_attention_dim": 6, "sample_size": 8,
    },
    "sd2": {
        "block_out_channels": [8, 16], "layers_per_block": [1, 2], "norm_num_groups": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [2, 4], "cross_attention_dim": 6, "use_linear_projection": True,
        "upcast_attention": True, "dual_cross_attention": False,
    },
    "sdxl": {
        "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2], "cross_attention_dim": 6, "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 29,
    },
    "shifted": {
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "attention_head_dim": 2, "cross_attention_dim": [6, 6],
        "only_cross_attention": [False, True],
        "resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.3, "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 7, "mid_block_scale_factor": 1.2,
    },
    "fourier": {
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 2,
        "cross_attention_dim": 6, "time_embedding_type": "fourier", "time_embedding_act_fn": "silu",
        "timestep_post_act": "silu", "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 7, "class_embeddings_concat": True,
        "time_cond_proj_dim": 5, "conv_in_kernel": 1, "conv_out_kernel": 5,
        "mid_block_type": "UNetMidBlock2D", "flip_sin_to_cos": False,
    },
    "odd": {
        "block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 2, "cross_attention_dim": 6, "mid_block_type": None,
        "num_class_embeds": 3, "encoder_hid_dim": 9, "encoder_hid_dim_type": "text_proj",
    },
    "uneven": {
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "CrossAttnUpBlock2D"],
        "transformer_layers_per_block": [[2], [1]],
        "reverse_transformer_layers_per_block": [[1, 1], [1, 2]],
        "attention_head_dim": 4, "cross_attention_dim": 6, "act_fn": "gelu", "freq_shift": 1,
        "class_embed_type": "timestep", "center_input_sample": True, "downsample_padding": 0,
    },
}  # fmt: skip

AUTOENCODERS = {
    "sd": {
        "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4, "sample_size": 8, "force_upcast": True,
    },
    "sd3": {
        "block_out_channels": [4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 6, "use_quant_conv": False, "use_post_quant_conv": False,
        "scaling_factor": 1.5305, "shift_factor": 0.0609, "latents_mean": None,
    },
    "attentive": {
        "block_out_channels": [4, 8], "layers_per_block": 2, "norm_num_groups": 2,
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "act_fn": "relu",
        "latent_channels": 2, "mid_block_add_attention": False, "in_channels": 1, "out_channels": 1,
    },
}  # fmt: skip

FAMILIES = {"unet": UNETS, "conditional_unet": CONDITIONAL, "autoencoder": AUTOENCODERS}
CLASSES = {
    "unet": "UNet2DModel",
    "conditional_unet": "UNet2DConditionModel",
    "autoencoder": "AutoencoderKL",
}


def draw(name, shape):
    """A float32 array that depends on its name and shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.normal(size=shape).astype(np.float32)


def weights(layout):
    """Weights for a published layout: features stay of order one, and norms do not vanish."""
    found = {}
    for name, shape in layout.items():
        value = draw(name, shape)
        if name == "time_proj.weight" and len(shape) == 1:
            found[name] = value
        elif len(shape) == 1:
            found[name] = (name.endswith("weight") + 0.2 * value).astype(np.float32)
        else:
            found[name] = (value / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return found


def size_of(family, case):
    """Height and width of the input of a case."""
    return (6, 10) if (family, case) == ("conditional_unet", "odd") else (8, 8)


def inputs(family, case):
    """The inputs of a case by name, images (H, W, C); `dx` is the direction of the JVP."""
    config = FAMILIES[family][case]
    channels = config.get("in_channels", 4 if family == "conditional_unet" else 3)
    shape = (*size_of(family, case), channels)
    found = {"x": draw("x", shape), "dx": draw("dx", shape), "t": np.float32(13.0)}
    if family == "autoencoder":
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        latent = (8 // factor, 8 // factor, config["latent_channels"])
        found |= {"z": draw("z", latent), "dz": draw("dz", latent)}
    if family == "conditional_unet":
        found["context"] = draw("context", (5, config.get("encoder_hid_dim", 6)))
    if config.get("addition_embed_type") == "text_time":
        found["text_embeds"] = draw("text_embeds", (5,))
        found["time_ids"] = np.array([64, 48, 0, 3, 64, 64], np.float32)
    if config.get("num_class_embeds") is not None:
        found["label"] = np.int32(2)
    kind = config.get("class_embed_type")
    if kind is not None:
        size = {"identity": config.get("time_embedding_dim")}.get(kind, 7)
        found["label"] = np.float32(3.0) if kind == "timestep" else draw("label", (size,))
    if config.get("time_cond_proj_dim") is not None:
        found["guidance"] = draw("guidance", (config["time_cond_proj_dim"],))
    return found
