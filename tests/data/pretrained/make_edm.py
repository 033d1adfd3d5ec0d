"""`edm.safetensors`: values and JVPs of the PyTorch models of github.com/NVlabs/edm.

Their code is not part of this repository: `EDM_CODE` in the environment is the path of a clone.
"""

import os
import sys

import numpy as np
import pretrained_cases as cases
from safetensors.numpy import save

SONG = {
    "img_resolution": 8, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channel_mult_emb": 2,
}  # fmt: skip
ADM = SONG | {"model_type": "DhariwalUNet"}
NCSN = {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
CASES = {
    "ddpmpp": SONG | {"_class_name": "EDMPrecond", "label_dim": 3, "augment_dim": 2},
    "ncsnpp": SONG | NCSN | {"_class_name": "EDMPrecond", "encoder_type": "residual"}
    | {"channel_mult": [1, 1], "attn_resolutions": [], "sigma_data": 0.7, "augment_dim": 2},
    "skip": SONG | NCSN | {"_class_name": "VEPrecond", "encoder_type": "skip"}
    | {"decoder_type": "skip", "channel_mult": [1, 1, 2]},
    "vp": SONG | {"_class_name": "VPPrecond", "resample_filter": [1, 2, 3, 1], "beta_d": 15.0},
    "adm": ADM | {"_class_name": "EDMPrecond", "model_channels": 64, "label_dim": 3},
    "iddpm": ADM | {"_class_name": "iDDPMPrecond", "label_dim": 3, "M": 50},
}  # fmt: skip
LABELS = {"ddpmpp": 1, "adm": 2}  # "iddpm" is asked without one
STEP = 20  # of the table of "iddpm", whose reference rounds noise levels to it


def inputs(case):
    return {"x": 2 * cases.draw("x", (8, 8, 3)), "dx": cases.draw("dx", (8, 8, 3))}


def reference(case):
    """The PyTorch model with drawn weights, and the noise level at which it is asked."""
    import torch

    sys.path.insert(0, os.environ["EDM_CODE"])
    from training import networks

    class Attention:
        """Their own has no JVP."""

        @staticmethod
        def apply(q, k):
            return torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / k.shape[1] ** 0.5, 2)

    networks.AttentionOp = Attention
    config = {k: v for k, v in CASES[case].items() if not k.startswith("_")}
    model = getattr(networks, CASES[case]["_class_name"])(**config).eval().requires_grad_(False)
    state = model.state_dict()
    names = [k for k in state if not k.endswith("resample_filter") and k != "u"]
    drawn = cases.weights({k.removeprefix("model."): tuple(state[k].shape) for k in names})
    state |= {k: torch.from_numpy(drawn[k.removeprefix("model.")]) for k in names}
    model.load_state_dict(state)
    sigma = float(model.u[50 - 1 - STEP]) if case == "iddpm" else 0.8
    return model, sigma


def answers(case):
    import torch

    torch.set_num_threads(1)
    model, sigma = reference(case)
    given = inputs(case)
    point, direction = (
        torch.from_numpy(given[name].transpose(2, 0, 1)[None].copy()) for name in ("x", "dx")
    )
    label = None
    if case in LABELS:
        label = torch.nn.functional.one_hot(torch.tensor([LABELS[case]]), 3)
    pair = torch.func.jvp(lambda x: model(x, torch.tensor([sigma]), label), (point,), (direction,))
    found = {
        name: np.ascontiguousarray(value.numpy()[0].transpose(1, 2, 0))
        for name, value in zip(("y", "dy"), pair, strict=True)
    }
    return found | {"sigma": np.float32([sigma])}


def make(folder):
    if "EDM_CODE" not in os.environ:
        print("edm: left out, EDM_CODE is not set")
        return
    found = {f"{case}.{name}": v for case in CASES for name, v in answers(case).items()}
    (folder / "edm.safetensors").write_bytes(save(found))
