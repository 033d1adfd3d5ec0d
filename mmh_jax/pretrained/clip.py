r"""CLIP's text encoder (Radford et al. 2021, 2103.00020), as Stable Diffusion conditions on it.

    h_0 = token(ids) + position
    h <- h + attention(norm(h)),  each token sees itself and those before it
    h <- h + MLP(norm(h))                                              `num_hidden_layers` times
    last = norm(h),   pooled = last at the first end-of-text,   projected = W pooled

Stable Diffusion 1 and 2 take `last`.  SDXL takes the layer before the last, not normalised, of both
its encoders, and `projected` of the second.  "Clip skip" n takes `final_layer_norm` of n layers
earlier (`CLIPTextModel.skipped`).  Configurations older than 2023 say `eos_token_id` 2, which is
wrong: there the end of the text is the largest id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmh_jax.data.files import PathLike
from mmh_jax.pretrained.files import fault, read_json, shown
from mmh_jax.pretrained.layers import Embedding, LayerNorm, Linear, activation, attend
from mmh_jax.pretrained.tensors import open_weights
from mmh_jax.pretrained.weights import restore
from mmh_jax.typing import Array

__all__ = ["CLIPTextModel", "TextEncoding", "load_text_encoder", "published_name"]

ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")
LEGACY_EOS = 2
_SIZES = {  # what CLIPTextConfig says where a file says nothing
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}


class TextEncoding(NamedTuple):
    """What the encoder says about one text of L tokens.

    Attributes:
        last: (L, width), the last layer, normalised.
        pooled: (width,), `last` at the end of the text.
        projected: (projection_dim,), or None for an encoder without projection.
        hidden: the embedding and the output of each layer, (L, width) each, not normalised:
            `hidden[-2]` is the layer before the last.
    """

    last: Array
    pooled: Array
    projected: Array | None
    hidden: tuple[Array, ...]


class _Embeddings(nnx.Module):
    def __init__(self, vocabulary: int, positions: int, width: int, *, rngs: nnx.Rngs):
        self.token_embedding = Embedding(vocabulary, width, rngs=rngs)
        self.position_embedding = Embedding(positions, width, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[0]))


class _Attention(nnx.Module):
    """Of each token to itself and those before it."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.q_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, h: Array) -> Array:
        length = h.shape[0]
        q, k, v = (
            project(h).reshape(length, self.num_heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        later = jnp.triu(jnp.full((length, length), -jnp.inf), 1)
        return self.out_proj(attend(q, k, v, bias=later).reshape(length, -1))


class _MLP(nnx.Module):
    def __init__(self, width: int, hidden: int, act: Callable, *, rngs: nnx.Rngs):
        self.act = act
        self.fc1 = Linear(width, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, width, rngs=rngs)

    def __call__(self, h: Array) -> Array:
        return self.fc2(self.act(self.fc1(h)))


class _Layer(nnx.Module):
    def __init__(self, sizes: Mapping[str, int], act: Callable, eps: float, *, rngs: nnx.Rngs):
        width = sizes["hidden_size"]
        self.self_attn = _Attention(width, sizes["num_attention_heads"], rngs=rngs)
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.mlp = _MLP(width, sizes["intermediate_size"], act, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, eps=eps)

    def __call__(self, h: Array) -> Array:
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp(self.layer_norm2(h))


class _Encoder(nnx.Module):
    def __init__(self, sizes: Mapping[str, int], act: Callable, eps: float, *, rngs: nnx.Rngs):
        layers = range(sizes["num_hidden_layers"])
        self.layers = nnx.List([_Layer(sizes, act, eps, rngs=rngs) for _ in layers])


class _TextModel(nnx.Module):
    def __init__(self, sizes: Mapping[str, int], act: Callable, eps: float, *, rngs: nnx.Rngs):
        width = sizes["hidden_size"]
        self.embeddings = _Embeddings(
            sizes["vocab_size"], sizes["max_position_embeddings"], width, rngs=rngs
        )
        self.encoder = _Encoder(sizes, act, eps, rngs=rngs)
        self.final_layer_norm = LayerNorm(width, eps=eps)


class CLIPTextModel(nnx.Module):
    """The text encoder, with or without projection; `encoder(ids)` for one text.

    Args:
        config: the content of a published `config.json`.  With `architectures` of
            `CLIPTextModelWithProjection` there is a projection.
        rngs: the source of the initial weights.
        caller, path: to name in an error.

    Raises:
        ValueError: if the configuration is not of such an encoder, or a value is wrong.

    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> sizes |= {"vocab_size": 50, "intermediate_size": 16, "eos_token_id": 49}
    >>> def encode(ids):
    ...     return CLIPTextModel(sizes, rngs=nnx.Rngs(0))(ids)
    >>> encoding = nnx.eval_shape(encode, np.array([48, 3, 7, 49, 49]))
    >>> encoding.last.shape, encoding.pooled.shape, len(encoding.hidden)
    ((5, 8), (8,), 3)
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        rngs: nnx.Rngs,
        caller: str = "CLIPTextModel",
        path: PathLike = "config.json",
    ):
        sizes, eps, projection = _checked(config, caller, path)
        act = activation(config.get("hidden_act", "quick_gelu"), caller)
        self.max_length = sizes["max_position_embeddings"]
        self.width = sizes["hidden_size"]
        self.eos: int = config.get("eos_token_id", 49407)
        self.text_model = _TextModel(sizes, act, eps, rngs=rngs)
        self.text_projection = (
            None if projection is None else Linear(self.width, projection, bias=False, rngs=rngs)
        )

    def __call__(self, ids: Array) -> TextEncoding:
        """The encoding of one text.

        Args:
            ids: (L,) token ids with begin and end, L at most `max_length`; an id that is not in
                the vocabulary gives NaN.

        Raises:
            TypeError: if ids are no integers.
            ValueError: if their shape is another.
        """
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"`CLIPTextModel(ids=...)` has dtype {ids.dtype}; ids are integers.")
        if ids.ndim != 1 or not 1 <= ids.shape[0] <= self.max_length:
            cure = "Did you mean `jax.vmap`?" if ids.ndim == 2 else "Use its tokenizer."
            raise ValueError(
                f"`CLIPTextModel(ids=...)` has shape {ids.shape}; it takes one text, (L,) with L "
                f"from 1 to {self.max_length}. {cure}"
            )
        model = self.text_model
        hidden = [model.embeddings(ids)]
        for layer in model.encoder.layers:
            hidden.append(layer(hidden[-1]))
        last = model.final_layer_norm(hidden[-1])
        end = jnp.argmax(ids if self.eos == LEGACY_EOS else ids == self.eos)
        pooled = last[end]
        projected = None if self.text_projection is None else self.text_projection(pooled)
        return TextEncoding(last, pooled, projected, tuple(hidden))

    def skipped(self, encoding: TextEncoding, num: int) -> Array:
        """`last`, had the encoder `num` layers fewer: "clip skip" of Stable Diffusion 1 and 2.

        Args:
            encoding: of this encoder.
            num: layers to leave out; 0 for none.

        Returns:
            (L, width).

        Raises:
            ValueError: if there are not so many layers.
        """
        layers = len(encoding.hidden) - 1
        if not 0 <= num <= layers:
            raise ValueError(f"`skipped(num={num})` must be from 0 to {layers}, the layers.")
        return self.text_model.final_layer_norm(encoding.hidden[layers - num])


def _checked(
    config: Mapping[str, Any], caller: str, path: PathLike
) -> tuple[dict[str, int], float, int | None]:
    """Sizes, epsilon, and the size of the projection or None."""
    kind = config.get("model_type", "clip_text_model")
    names = config.get("architectures") or ["CLIPTextModel"]
    if kind != "clip_text_model" or not isinstance(names, list) or names[0] not in ARCHITECTURES:
        raise fault(
            caller, path, f"is of {shown(names)} ({shown(kind)})",
            f"Read are {' and '.join(ARCHITECTURES)}.",
        )  # fmt: skip
    for option in ("quantization_config", "use_attention_mask"):
        if config.get(option):
            raise fault(caller, path, f"has {option}, which is not supported", "Use another file.")
    projection = {"projection_dim": 512} if names[0] == ARCHITECTURES[1] else {}
    sizes: dict[str, int] = {}
    for name, default in (_SIZES | projection).items():
        size = config.get(name, default)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 2**24:
            raise fault(
                caller, path, f"has the {name} {shown(size)}", "It is a number of at least 1."
            )
        sizes[name] = size
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise fault(
            caller, path, "has a hidden_size that does not divide into num_attention_heads",
            "Use the config.json that was published with this model.",
        )  # fmt: skip
    eps, eos = config.get("layer_norm_eps", 1e-5), config.get("eos_token_id", 49407)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise fault(caller, path, f"has the layer_norm_eps {shown(eps)}", "It is about 1e-5.")
    if not isinstance(eos, int):
        raise fault(caller, path, f"has the eos_token_id {shown(eos)}", "It is one id.")
    return sizes, eps, sizes.pop("projection_dim", None)


def published_name(name: str) -> str | None:
    """A name in a file as the network has it; None for what is no parameter.

    Newer versions of transformers write the encoder without projection with shorter names, and old
    ones wrote a table of positions.

    >>> published_name("final_layer_norm.bias")
    'text_model.final_layer_norm.bias'
    >>> published_name("text_model.embeddings.position_ids")
    """
    if name.endswith("embeddings.position_ids"):
        return None
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def load_text_encoder(
    folder: PathLike,
    *,
    dtype: str = "float32",
    variant: str | None = None,
    place: Callable[[str, np.ndarray], Array] | None = None,
    caller: str = "load_text_encoder",
) -> CLIPTextModel:
    """Read a text encoder's folder: `config.json` and `model.safetensors`.

    Args:
        folder: such as `text_encoder` or `text_encoder_2` in a pipeline.
        dtype: of parameters and computation, "float32" or "bfloat16".
        variant: such as "fp16", for `model.fp16.safetensors`.
        place: as in `restore`.
        caller: the function to name in an error.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is wrong, or the two do not fit.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, caller=caller)
    return restore(
        lambda: CLIPTextModel(config, rngs=nnx.Rngs(0), caller=caller, path=path),
        open_weights(folder, caller=caller, stem="model", variant=variant),
        caller=caller,
        path=folder,
        dtype=dtype,
        rename=published_name,
        place=place,
    )
