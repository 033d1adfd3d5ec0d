"""Which ways to mitigate are tried on prompts, at which strengths, and what of it is refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmh_jax import mitigation
from mmh_jax.report.changed import Trial
from mmh_jax.report.reworded import CRITERIA
from mmh_jax.report.stages import check_count

__all__ = ["CHAT_KEY", "REWRITERS", "WAYS", "PromptPlan"]

WAYS = ("tokens", "random", "embedding", "noise", "late", "weaker")
REWRITERS = ("random", "mask", "chat")
CHAT_KEY = "MMH_JAX_CHAT_KEY"  # of the environment: an option would be seen by all of a machine


@dataclasses.dataclass(frozen=True)
class PromptPlan:
    """Which ways are tried on which prompts, at which strengths.

    Attributes:
        prompts: a file of them; an `image` on a line is the training picture.
        ways: of `WAYS`.
        generate: pictures of each prompt by each way.
        guidance_scale, num_steps: of the sampler.
        criterion: what blames tokens and is lowered: `cfg_norm`, `sharpness` or `score_norm` at the
            first level, or `flipd` at a late state of the plain trajectory, of the first picture.
        num_tokens: strengths of `tokens` and `random`: how many are replaced, if there are so many.
        rewriter: of these: `random`, `mask` or `chat`.
        rewrites: how often for each prompt and strength.
        chat_url, chat_model: of `mitigation.chat_rewriter`; its key is the environment variable
            `MMH_JAX_CHAT_KEY`.
        optimise_steps: strengths of `embedding` and `noise`.
        begins: strengths of `late`: shares of the training's times from which on guidance acts.
        scales: strengths of `weaker`: guidance scales.
        probes: of FLIPD.
        dtype: of the networks, "float32" or "bfloat16".
        skip_t5: of Stable Diffusion 3, as for `pretrained.load`.
    """

    prompts: Path
    ways: tuple[str, ...] = ("tokens", "random", "embedding", "late", "weaker")
    generate: int = 4
    guidance_scale: float = 7.5
    num_steps: int = 50
    criterion: str = "cfg_norm"
    num_tokens: tuple[int, ...] = (1, 2, 4)
    rewriter: str = "random"
    rewrites: int = 1
    chat_url: str | None = None
    chat_model: str | None = None
    optimise_steps: tuple[int, ...] = (20,)
    begins: tuple[float, ...] = (0.8, 0.6)
    scales: tuple[float, ...] = (3.0, 1.0)
    probes: int = 8
    dtype: str = "float32"
    skip_t5: bool = False

    @property
    def rewords(self) -> bool:
        """Whether tokens are replaced."""
        return bool({"tokens", "random"} & set(self.ways))

    def check(self) -> None:
        """Raise ValueError for what is out of range, unknown, missing, or there twice."""
        _check_names("--ways", self.ways, WAYS)
        _check_names("--criterion", (self.criterion,), CRITERIA)
        _check_names("--rewriter", (self.rewriter,), REWRITERS)
        for option, value in {
            "--generate": self.generate, "--rewrites": self.rewrites, "--num-steps": self.num_steps,
            "--num-tokens": min(self.num_tokens, default=None),
            "--optimise-steps": min(self.optimise_steps, default=None),
        }.items():  # fmt: skip
            check_count(option, value)
        check_count("--probes", self.probes, least=2)
        for option, values in self._strengths.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{option} are {values}; name at least one, and none twice.")
        for scale in (self.guidance_scale, *self.scales):
            if not np.isfinite(scale):
                raise ValueError(f"a guidance scale is {scale}; it must be finite.")
        for begin in self.begins:
            if not 0 < begin < 1:
                raise ValueError(
                    f"--begins has {begin:g}; of prompts it is a share of the training's times, "
                    "between 0 and 1."
                )
        self._check_chat()

    @property
    def _strengths(self) -> dict[str, tuple[Any, ...]]:
        """Of the ways that are tried, by option."""
        of_ways = {
            "--num-tokens": (self.rewords, self.num_tokens),
            "--optimise-steps": ({"embedding", "noise"} & set(self.ways), self.optimise_steps),
            "--begins": ("late" in self.ways, self.begins),
            "--scales": ("weaker" in self.ways, self.scales),
        }
        return {option: values for option, (is_tried, values) in of_ways.items() if is_tried}

    def _check_chat(self) -> None:
        given = [self.chat_url, self.chat_model]
        if self.rewriter == "chat" and self.rewords and None in given:
            raise ValueError(
                "--rewriter chat asks a language model; pass --chat-url ADDRESS and --chat-model "
                f"NAME, and its key, if it has one, in the environment variable {CHAT_KEY}."
            )
        if self.rewriter != "chat" and given != [None, None]:
            raise ValueError("--chat-url and --chat-model are of --rewriter chat; leave them out.")

    def chat(self) -> Any:
        """The rewriter of `mitigation`, or None."""
        if self.rewriter != "chat" or not self.rewords:
            return None
        return mitigation.chat_rewriter(
            self.chat_url or "", self.chat_model or "", num_rewrites=self.rewrites,
            api_key=os.environ.get(CHAT_KEY) or None,
        )  # fmt: skip

    def trials(self) -> list[Trial]:
        """All but the plain one."""
        numbers = range(self.rewrites)
        strengths: dict[str, Sequence[float]] = {
            "tokens": self.num_tokens, "random": self.num_tokens,
            "embedding": self.optimise_steps, "noise": self.optimise_steps,
            "late": self.begins, "weaker": self.scales,
        }  # fmt: skip
        return [
            Trial(way, strength, rewrite)
            for way in self.ways
            for strength in strengths[way]
            for rewrite in (numbers if way in ("tokens", "random") else [None])
        ]


def _check_names(option: str, given: tuple[str, ...], there: tuple[str, ...]) -> None:
    if unknown := [name for name in given if name not in there]:
        raise ValueError(f"{option} {unknown[0]!r} is unknown; there are {', '.join(there)}.")
    if not given or len(set(given)) != len(given):
        raise ValueError(f"{option}: name at least one, and none twice.")
