"""`clip.safetensors`: what transformers' text encoders answer."""

import numpy as np
import pretrained_cases as cases
from safetensors.numpy import save

SIZES = {
    "model_type": "clip_text_model",
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "layer_norm_eps": 1e-5,
}
PROJECTED = {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 12}
CASES = {
    "sd1": SIZES | {"hidden_act": "quick_gelu", "eos_token_id": 59},
    "sd2": SIZES | {"hidden_act": "gelu", "eos_token_id": 2, "num_attention_heads": 4},
    "xl2": SIZES | PROJECTED | {"hidden_act": "gelu", "eos_token_id": 2},
    "projected": SIZES | PROJECTED | {"hidden_act": "quick_gelu", "eos_token_id": 50},
}
# Begin, words, end, and padding: by the end, by 0; in the third the largest id is not the end.
IDS = np.array([[58, 3, 41, 17, 59, 59, 59], [58, 5, 59, 0, 0, 0, 0], [58, 1, 57, 50, 55, 50, 59]])


def published(name):
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def load(module, rename=lambda name: name):
    """A PyTorch module with drawn weights; `rename` gives the published name of its own."""
    import torch

    state = module.state_dict()
    drawn = cases.weights({rename(name): tuple(value.shape) for name, value in state.items()})
    module.load_state_dict({name: torch.from_numpy(drawn[rename(name)]) for name in state})
    return module.eval().requires_grad_(False)


def reference(case):
    """The PyTorch module with drawn weights."""
    import transformers

    config = CASES[case]
    names = config.get("architectures", ["CLIPTextModel"])
    module = getattr(transformers, names[0])(transformers.CLIPTextConfig(**config))
    return load(module, published)


def answers(case, module=None):
    """`last`, `pooled` (or `projected`) and the layer before the last, for each of `IDS`."""
    import torch

    module = reference(case) if module is None else module
    with torch.no_grad():
        found = module(torch.from_numpy(IDS), output_hidden_states=True)
    pooled = found.text_embeds if "architectures" in CASES[case] else found.pooler_output
    kept = {"last": found.last_hidden_state, "pooled": pooled, "before": found.hidden_states[-2]}
    return {name: value.float().numpy() for name, value in kept.items()}


def make(folder):
    found = {f"{case}.{name}": v for case in CASES for name, v in answers(case).items()}
    (folder / "clip.safetensors").write_bytes(save(found))
