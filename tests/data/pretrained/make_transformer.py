"""`transformer.safetensors`: values and JVPs of diffusers' transformers."""

import make_clip
import numpy as np
import pretrained_cases as cases
from safetensors.numpy import save

DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2,
    "sample_size": 8, "num_embeds_ada_norm": 10,
}  # fmt: skip
SD3 = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
    "num_layers": 2, "sample_size": 8, "pos_embed_max_size": 6, "caption_projection_dim": 16,
    "joint_attention_dim": 5, "pooled_projection_dim": 7,
}  # fmt: skip
CASES = {
    "dit": DIT | {"out_channels": 6},
    "dit_other": DIT | {"patch_size": 4, "attention_bias": False, "activation_fn": "gelu"}
    | {"norm_elementwise_affine": True},
    "dit_larger": DIT | {"sample_size": 4},
    "sd3": SD3,
    "sd35": SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": [0]},
    "sd35_large": SD3 | {"qk_norm": "rms_norm", "patch_size": 1, "pos_embed_max_size": 9},
}  # fmt: skip


def name_of(case):
    return "SD3Transformer2DModel" if case.startswith("sd3") else "DiTTransformer2DModel"


def inputs(case):
    """The point, direction, time and condition of a case, images (H, W, C)."""
    joint = case.startswith("sd3")
    shape = (6, 8, 4) if joint else (8, 8, 3)
    found = {"x": cases.draw("x", shape), "dx": cases.draw("dx", shape), "t": np.float32(321.0)}
    if joint:
        return found | {"context": cases.draw("context", (4, 5))} | {
            "pooled": cases.draw("pooled", (7,))
        }  # fmt: skip
    return found | {"label": np.int32(10 if case == "dit_other" else 4)}  # 10 is none


def reference(case):
    import diffusers

    return make_clip.load(getattr(diffusers, name_of(case))(**CASES[case]))


def answers(case, module=None):
    """`y` and its JVP `dy` along `dx`, (H, W, C)."""
    import torch

    module = reference(case) if module is None else module
    given = inputs(case)
    t = torch.tensor([given["t"]])
    point, direction = (
        torch.from_numpy(given[name].transpose(2, 0, 1)[None].copy()) for name in ("x", "dx")
    )

    def call(x):
        if case.startswith("sd3"):
            context, pooled = (torch.from_numpy(given[n][None]) for n in ("context", "pooled"))
            return module(x, context, pooled, t).sample
        label = torch.tensor([int(given["label"])])
        return module(x, timestep=t, class_labels=label).sample

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        pair = torch.func.jvp(call, (point,), (direction,))
    return {
        name: np.ascontiguousarray(value.numpy()[0].transpose(1, 2, 0))
        for name, value in zip(("y", "dy"), pair, strict=True)
    }


def make(folder):
    found = {f"{case}.{name}": v for case in CASES for name, v in answers(case).items()}
    (folder / "transformer.safetensors").write_bytes(save(found))
