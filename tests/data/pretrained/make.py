"""Write the fixtures of this folder with PyTorch, diffusers and transformers:

    python tests/data/pretrained/make.py [family ...]

The weights are drawn by NumPy (`tests/pretrained_cases.py`), so that a fixture holds answers alone.
"""

import gzip
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import make_clip  # noqa: E402
import make_edm  # noqa: E402
import make_iddpm  # noqa: E402
import make_pipeline  # noqa: E402
import make_stylegan  # noqa: E402
import make_tokenizer  # noqa: E402
import make_transformer  # noqa: E402
import pretrained_cases as cases  # noqa: E402


def contiguous(module, args):
    """Forward mode of PyTorch's group norm needs contiguous values and tangents."""
    return (args[0].clone(memory_format=torch.contiguous_format),)


def build(family, case):
    """The PyTorch network of a case with its weights, in evaluation mode."""
    torch.set_num_threads(1)
    network = getattr(diffusers, cases.CLASSES[family])(**cases.FAMILIES[family][case]).eval()
    layout = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    drawn = cases.weights(layout)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in drawn.items()})
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(contiguous)
    return network.requires_grad_(False)


def first(array):
    """(H, W, C) as a batch of one, (1, C, H, W)."""
    return torch.from_numpy(array.transpose(2, 0, 1)[None].copy())


def last(tensor):
    """A batch of one as (H, W, C)."""
    return tensor.numpy()[0].transpose(1, 2, 0)


def functions(family, case):
    """The maps of a case, each with its point and direction, by name."""
    given = cases.inputs(family, case)
    network = build(family, case)

    def batch(name):
        return None if name not in given else torch.from_numpy(np.asarray(given[name])[None])

    point = first(given["x"]), first(given["dx"])
    if family == "autoencoder":
        latent = first(given["z"]), first(given["dz"])
        return {
            "mean": (lambda x: network.encode(x).latent_dist.mean, *point),
            "log_variance": (lambda x: network.encode(x).latent_dist.logvar, *point),
            "image": (lambda z: network.decode(z).sample, *latent),
        }
    t = torch.tensor(float(given["t"]))
    if family == "unet":
        t = t.long() if network.config.time_embedding_type == "learned" else t
        return {"y": (lambda x: network(x, t, batch("label")).sample, *point)}
    added = {name: batch(name) for name in ("text_embeds", "time_ids")}

    def call(x):
        return network(
            x, t, batch("context"), class_labels=batch("label"), timestep_cond=batch("guidance"),
            added_cond_kwargs=None if added["time_ids"] is None else added,
        ).sample  # fmt: skip

    return {"y": (call, *point)}


def answers(family, case):
    """The values and JVPs of a case by name, images (H, W, C)."""
    found = {}
    for name, (function, point, direction) in functions(family, case).items():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            value, tangent = torch.func.jvp(function, (point,), (direction,))
        found |= {name: last(value), f"d{name}": last(tangent)}
    return found


def family_of_networks(family):
    """Write the answers of all cases of one family to one file."""
    found = {}
    for case in cases.FAMILIES[family]:
        for name, array in answers(family, case).items():
            found[f"{case}.{name}"] = np.ascontiguousarray(array)
    save_file(found, HERE / f"{family}.safetensors")


def layouts():
    """Write name and shape of every parameter of the full-size networks in `full_size.json`."""
    configs = json.loads((HERE / "full_size.json").read_text())
    found = {}
    for name, config in configs.items():
        with torch.device("meta"):
            network = getattr(diffusers, config["_class_name"]).from_config(config)
        found[name] = {key: list(value.shape) for key, value in network.state_dict().items()}
    before = json.loads(gzip.decompress((HERE / "layouts.json.gz").read_bytes()))
    found |= make_stylegan.layouts() or {name: before[name] for name in make_stylegan.PUBLISHED}
    text = json.dumps(found, separators=(",", ":"), sort_keys=True).encode()
    (HERE / "layouts.json.gz").write_bytes(gzip.compress(text, mtime=0))


MAKERS = {
    **{family: lambda family=family: family_of_networks(family) for family in cases.FAMILIES},
    "layouts": layouts,
    "clip": lambda: make_clip.make(HERE),
    "edm": lambda: make_edm.make(HERE),
    "iddpm": lambda: make_iddpm.make(HERE),
    "pipeline": lambda: make_pipeline.make(HERE),
    "stylegan": lambda: make_stylegan.make(HERE),
    "tokenizer": lambda: make_tokenizer.make(HERE),
    "transformer": lambda: make_transformer.make(HERE),
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or MAKERS:
        MAKERS[wanted]()
