"""`iddpm.safetensors`: values and JVPs of the U-Net of github.com/openai/improved-diffusion.

Its code is not part of this repository: `IDDPM_CODE` in the environment is the path of a clone.
"""

import os
import sys

import make_clip
import numpy as np
import pretrained_cases as cases
from safetensors.numpy import save

SIZES = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
CASES = {
    "learned": SIZES | {"learn_sigma": True, "num_heads": 2, "attention_resolutions": "4"}
    | {"diffusion_steps": 400, "noise_schedule": "cosine"},
    "classes": SIZES | {"class_cond": True, "use_scale_shift_norm": False, "num_heads": 4}
    | {"attention_resolutions": "8", "num_heads_upsample": 2},
}  # fmt: skip
LABELS = {"classes": 7}
TIME = 123.0


def inputs(case):
    return {"x": cases.draw("x", (8, 8, 3)), "dx": cases.draw("dx", (8, 8, 3))}


def answers(case):
    import torch

    sys.path.insert(0, os.environ["IDDPM_CODE"])
    from improved_diffusion.unet import UNetModel

    torch.set_num_threads(1)
    o = CASES[case]
    module = UNetModel(
        3,
        o["num_channels"],
        6 if o.get("learn_sigma") else 3,
        o["num_res_blocks"],
        tuple(8 // int(size) for size in o["attention_resolutions"].split(",")),
        channel_mult=o["channel_mult"],
        num_classes=1000 if o.get("class_cond") else None,
        num_heads=o["num_heads"],
        num_heads_upsample=o.get("num_heads_upsample", -1),
        use_scale_shift_norm=o.get("use_scale_shift_norm", True),
    )
    module = make_clip.load(module)
    given = inputs(case)
    point, direction = (
        torch.from_numpy(given[name].transpose(2, 0, 1)[None].copy()) for name in ("x", "dx")
    )
    label = torch.tensor([LABELS[case]]) if case in LABELS else None
    pair = torch.func.jvp(lambda x: module(x, torch.tensor([TIME]), label), (point,), (direction,))
    return {
        name: np.ascontiguousarray(value.numpy()[0].transpose(1, 2, 0))
        for name, value in zip(("y", "dy"), pair, strict=True)
    }


def make(folder):
    if "IDDPM_CODE" not in os.environ:
        print("iddpm: left out, IDDPM_CODE is not set")
        return
    found = {f"{case}.{name}": v for case in CASES for name, v in answers(case).items()}
    (folder / "iddpm.safetensors").write_bytes(save(found))
