"""`stylegan.safetensors`: values and JVPs of github.com/NVlabs/stylegan2-ada-pytorch.

Its code is not part of this repository: `STYLEGAN2_CODE` in the environment is the path of a clone.
"""

import os
import sys

import numpy as np
import pretrained_cases as cases
from safetensors.numpy import save

SIZES = {"z_dim": 6, "c_dim": 0, "w_dim": 8, "img_resolution": 16, "img_channels": 3}
WIDTHS = {"channel_base": 128, "channel_max": 16}
CASES = {
    "plain": SIZES | {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": WIDTHS},
    # An uneven filter, so that one that is turned is seen; a clamp that cuts.
    "classes": SIZES | {"c_dim": 3, "img_resolution": 32, "img_channels": 1}
    | {"mapping_kwargs": {"num_layers": 3, "embed_features": 5, "layer_features": 7}
       | {"lr_multiplier": 0.1},
       "synthesis_kwargs": WIDTHS | {"resample_filter": [1, 2, 4, 1], "conv_clamp": 1.5}
       | {"num_fp16_res": 4}},
    "silent": SIZES | {"mapping_kwargs": {"num_layers": 1, "w_avg_beta": None}}
    | {"synthesis_kwargs": WIDTHS | {"use_noise": False, "resample_filter": [1, 1]}},
}  # fmt: skip
LABELS = {"classes": 1}
TRUNCATION = {"plain": 0.7, "classes": 0.9}
NUM_WS = {"plain": 6, "classes": 8, "silent": 6}

# The arguments of published models, by `train.py` of the code.
FULL = {"z_dim": 512, "w_dim": 512, "img_channels": 3}
FULL_WIDTHS = {"channel_base": 32768, "channel_max": 512, "num_fp16_res": 4, "conv_clamp": 256}
PUBLISHED = {
    "stylegan2_ffhq1024": FULL | {"c_dim": 0, "img_resolution": 1024}
    | {"mapping_kwargs": {"num_layers": 8}, "synthesis_kwargs": FULL_WIDTHS},
    "stylegan2_cifar10": FULL | {"c_dim": 10, "img_resolution": 32}
    | {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": FULL_WIDTHS},
}  # fmt: skip


def inputs(case):
    shape = (NUM_WS[case], SIZES["w_dim"])
    return {"z": cases.draw("z", (6,)), "dz": cases.draw("dz", (6,)), "ws": cases.draw("ws", shape)}


def weights(layout, case):
    """Drawn weights of the size of the published ones: a mapping's are divided by its rate."""
    rate = CASES[case]["mapping_kwargs"].get("lr_multiplier", 0.01)
    found = {}
    for name, shape in layout.items():
        value = cases.draw(name, shape)
        if name.startswith("mapping.fc"):
            value = value / rate
        if name.endswith((".bias", ".noise_strength", ".w_avg")):
            value = 0.3 * value + name.endswith(".affine.bias")
        found[name] = np.asarray(value, np.float32)
    return found


def of_network(state):
    """The tensors that are not a filter, which follows from the configuration."""
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith(".resample_filter")}


def reference(config):
    sys.path.insert(0, os.environ["STYLEGAN2_CODE"])
    from training.networks import Generator

    return Generator(**config).eval().requires_grad_(False)


def answers(case):
    import torch

    torch.set_num_threads(1)
    module = reference(CASES[case])
    state = module.state_dict()
    drawn = weights(of_network(state), case)
    module.load_state_dict(state | {name: torch.from_numpy(v) for name, v in drawn.items()})
    given = {name: torch.from_numpy(value)[None] for name, value in inputs(case).items()}
    label = None
    if case in LABELS:
        label = torch.nn.functional.one_hot(torch.tensor([LABELS[case]]), 3)
    psi = TRUNCATION.get(case, 1.0)

    def image(z, mode="const"):
        return module(z, label, truncation_psi=psi, noise_mode=mode, force_fp32=True)

    y, dy = torch.func.jvp(image, (given["z"],), (given["dz"],))
    layers = module.synthesis(given["ws"], noise_mode="const", force_fp32=True)
    images = {"y": y, "dy": dy, "of_ws": layers}
    if case == "plain":
        images["without_noise"] = image(given["z"], "none")
    found = {n: np.ascontiguousarray(v.numpy()[0].transpose(1, 2, 0)) for n, v in images.items()}
    w = module.mapping(given["z"], label, truncation_psi=psi)
    return found | {"w": w.numpy()[0, 0].copy()}


def layouts():
    """Name and shape of every tensor of the full-size models; empty without a clone."""
    if "STYLEGAN2_CODE" not in os.environ:
        return {}
    return {
        name: {k: list(shape) for k, shape in of_network(reference(config).state_dict()).items()}
        for name, config in PUBLISHED.items()
    }


def make(folder):
    if "STYLEGAN2_CODE" not in os.environ:
        print("stylegan: left out, STYLEGAN2_CODE is not set")
        return
    found = {f"{case}.{name}": v for case in CASES for name, v in answers(case).items()}
    (folder / "stylegan.safetensors").write_bytes(save(found))
