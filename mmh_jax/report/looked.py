"""A published pipeline looked at: latents, their scores and curves, piece by piece.

Each piece is kept in the working folder when it is finished, and read from there if it is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmh_jax import lid, linalg, mapping, memorization, pretrained
from mmh_jax.pretrained.run import levels
from mmh_jax.report import detectors as table
from mmh_jax.report.asked import Asked, picture
from mmh_jax.report.files import kept_array, replacing
from mmh_jax.report.stages import Stages
from mmh_jax.typing import Key

if TYPE_CHECKING:
    from mmh_jax.report.published import PublishedOptions

__all__ = ["LOOK_AT", "OF_PICTURES", "Found", "Looked", "level_at"]

# As shares of the training's times: where detectors look, and where curves and encoding end.
LOOK_AT, UP_TO = 0.01, 0.5
ENCODE_LEVELS, BLOCK_SIZE = 12, 8
OF_PICTURES = ("png_bytes", "pixel_variance")
PER_BIT = ("flipd", "flipd_unconditional")


class Found(NamedTuple):
    """What is to be written.

    Attributes:
        columns: of the table, one entry for each picture.
        summary: for JSON.
        curves: `sigmas` (S,), `flipd` and `flipd_unconditional` (M, S), their errors `stderr_...`,
            and `memorized` (M,) where it is known; or None.
        pictures: the folder of drawn pictures, or None.
    """

    columns: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, np.ndarray] | None
    pictures: Path | None


class Looked(NamedTuple):
    """One call, after all checks.

    Attributes:
        pipeline: of `pretrained.load`.
        rows: one for each picture.
        options: of the call.
        names: of detectors.
        sigma: noise level, or None.
        seed, chunk_size: of the call.
        work: the working folder.
        stages: of progress.
    """

    pipeline: Any
    rows: list[Asked]
    options: PublishedOptions
    names: tuple[str, ...]
    sigma: float | None
    seed: int
    chunk_size: int
    work: Path
    stages: Stages

    def found(self) -> Found:
        """All of it."""
        points, num_bytes, variances = self.points()
        conditions, settings = self.conditions(), self.settings()
        asks = tuple(name for name in self.names if name not in OF_PICTURES)
        subject = memorization.Subject(points, self.pipeline.denoiser(), conditions=conditions)
        with self.stages("detectors") as report:
            scored = table.scores(
                asks, subject, settings, key=self.key(1), chunk_size=self.chunk_size,
                block_size=BLOCK_SIZE, folder=self.work / "scores", progress=report,
            )  # fmt: skip
        columns = table.columns_of(scored)
        for name, value in zip(OF_PICTURES, (num_bytes, variances), strict=True):
            if name in self.names:
                columns[f"score_{name}"] = -value.astype(float)
        for name in PER_BIT:
            if name in asks:
                per_bit = memorization.lid_per_bit(-scored.value[name], num_bytes)
                columns[f"score_{name}_per_bit"] = -per_bit
        summary: dict[str, Any] = {"sigma": float(np.asarray(settings.sigma))}
        summary["num_points"] = len(self.rows)
        summary |= table.summary_of(scored) | {"detection": self.detection(columns)}
        curves = None
        if self.options.curve_levels:
            curves = self.curves(points, conditions)
            num = sum(name.startswith("flipd") for name in curves)
            summary["evaluations"] += num * self.options.curve_levels * (1 + self.options.probes)
        drawn = None if self.options.images is not None else self.work / "pictures"
        return Found(self.described(num_bytes) | columns, summary, curves, drawn)

    def key(self, number: int) -> Key:
        """A key of its own for each use."""
        return jax.random.fold_in(jax.random.key(self.seed), number)

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The points of the denoiser, and of their pictures the bytes as PNG and the variance."""
        folder = self.work / "points"
        folder.mkdir(exist_ok=True)
        if self.options.images is not None:
            return self.encoded(folder)
        with self.stages("drawing") as report:
            points = self.drawn(folder, report)
        shown, looks = self.work / "pictures", []
        shown.mkdir(exist_ok=True)
        with self.stages("pictures") as report:
            for number, point in enumerate(points):
                looks.append(_look(self.decoded(point, shown / f"{number:05d}.png")))
                report(number + 1, len(points))
        return points, *np.transpose(looks)

    def encoded(self, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of pictures that are there."""
        parts, looks = [], []
        with self.stages("pictures") as report:
            for number, row in enumerate(self.rows):
                assert row.image is not None
                seen = picture(row.image, self.image_shape)
                encode = functools.partial(self.pipeline.encode, seen)
                parts.append(kept_array(folder / f"{number:06d}.npy", encode))
                looks.append(_look(seen))
                report(number + 1, len(self.rows))
        return np.stack(parts), *np.transpose(looks)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return getattr(self.pipeline, "image_shape", self.pipeline.shape)

    def drawn(self, folder: Path, report: Callable[..., None]) -> np.ndarray:
        """The samples, those of one prompt at a time."""
        options, parts = self.options, []
        total = len(self.rows)
        # All of one prompt lie together; without prompts a block is as good.
        size = options.generate if options.prompts is not None else BLOCK_SIZE
        for start in range(0, total, size):
            rows = self.rows[start : start + size]
            key = jax.random.fold_in(self.key(0), start)

            def draw(rows: list[Asked] = rows, key: Key = key) -> np.ndarray:
                how: dict[str, Any] = {"key": key, "num_steps": options.num_steps}
                how["chunk_size"] = self.chunk_size
                if isinstance(self.pipeline, pretrained.Unconditional):
                    return np.asarray(self.pipeline.encode(self.pipeline.sample(len(rows), **how)))
                how["guidance_scale"] = options.guidance_scale
                return self.pipeline.sample(
                    _asked_for(self.pipeline, rows[0].prompt), len(rows), **how
                )

            parts.append(kept_array(folder / f"{start:06d}.npy", draw))
            report(start + len(rows), total)
        return np.concatenate(parts)

    def decoded(self, point: np.ndarray, path: Path) -> np.ndarray:
        """The picture of a point, as a PNG file holds it."""
        if not path.exists():
            image = np.round(255 * np.nan_to_num(self.pipeline.decode(point))).astype(np.uint8)
            image = image[..., 0] if image.shape[-1] == 1 else image
            with replacing(path) as partial:
                Image.fromarray(image).save(partial, format="PNG")
        return picture(path, self.image_shape)

    def conditions(self) -> Any:
        """Of all rows, a pytree with a leading axis; None where there are no prompts."""
        prompts = [row.prompt for row in self.rows]
        if all(prompt is None for prompt in prompts):
            return None
        with self.stages("prompts") as report:
            each: dict[str | None, Any] = {}
            for prompt in dict.fromkeys(prompts):
                each[prompt] = jax.tree.map(np.asarray, _condition(self.pipeline, prompt))
                report(len(each), 0)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(each[p] for p in prompts))

    def level(self, share: float) -> float:
        """The noise level at a share of the training's times."""
        return level_at(self.pipeline.process, share)

    def settings(self) -> memorization.Settings:
        """Where detectors look: the paper's level, the published sampler's, up to the middle."""
        sigma = self.level(LOOK_AT) if self.sigma is None else self.sigma
        top = max(self.level(UP_TO), 2 * sigma)
        return memorization.Settings(
            np.float32(sigma),
            levels=levels(self.pipeline.process, self.options.num_steps)[0],
            encode_levels=np.geomspace(sigma, top, ENCODE_LEVELS).astype(np.float32),
            trace=linalg.rademacher(self.options.probes, chunk_size=1),
        )

    def curves(self, points: np.ndarray, conditions: Any) -> dict[str, np.ndarray]:
        """FLIPD over noise levels, with the prompt and without."""
        start = self.level(LOOK_AT) if self.sigma is None else self.sigma
        top = max(self.level(UP_TO), 2 * start)
        sigmas = np.geomspace(start, top, self.options.curve_levels).astype(np.float32)
        models = [conditions]
        if conditions is not None:  # the null condition as one more: the same program
            null = jax.tree.map(np.asarray, _condition(self.pipeline, None))
            models.append(jax.tree.map(lambda leaf: np.stack([leaf] * len(points)), null))
        run = _over_curves(self.options.probes, self.chunk_size)
        folder, parts = self.work / "curves", []
        folder.mkdir(exist_ok=True)
        # The same probes with and without: what is common to both cancels.
        keys, base = jax.random.split(self.key(2), len(points)), self.pipeline.denoiser()
        size = max(BLOCK_SIZE, self.chunk_size)
        with self.stages("curves") as report:
            for begin in range(0, len(points), size):
                rows = slice(begin, begin + size)

                def measure(rows: slice = rows) -> np.ndarray:
                    some = jax.tree.map(lambda leaf: leaf[rows], models)
                    given = ((points[rows], each, base, sigmas) for each in some)
                    return np.stack([run(*each, key=keys[rows]) for each in given], axis=1)

                parts.append(kept_array(folder / f"{begin:06d}.npy", measure))
                report(min(begin + size, len(points)), len(points))
        found = np.concatenate(parts)
        curves = {"sigmas": sigmas}
        names = ("flipd",) if conditions is None else ("flipd", "flipd_unconditional")
        for place, name in enumerate(names):
            curves |= {name: found[:, place, 0], f"stderr_{name}": found[:, place, 1]}
        if (known := self.memorized()) is not None:
            curves["memorized"] = known
        return curves

    def memorized(self) -> np.ndarray | None:
        """(M,) what the lines say; None if one says nothing."""
        said = [row.memorized for row in self.rows]
        return None if None in said else np.asarray(said, bool)

    def detection(self, columns: dict[str, np.ndarray]) -> dict[str, Any] | None:
        """How well each score finds what is said to be memorized, of means over a prompt's rows."""
        known = self.memorized()
        if known is None:
            return None
        num = self.options.generate if self.options.prompts is not None else 1
        labels = known[::num]
        return {
            name.removeprefix("score_"): table.detection_of(
                np.mean(np.reshape(value, (-1, num)), axis=1), labels, seed=self.seed
            )
            for name, value in columns.items() if not name.endswith("_stderr")
        }  # fmt: skip

    def described(self, num_bytes: np.ndarray) -> dict[str, Any]:
        """What each row is."""
        columns: dict[str, Any] = {"index": np.arange(len(self.rows))}
        fields = {name: [getattr(row, name) for row in self.rows] for name in Asked._fields}
        columns |= {
            name: values for name, values in fields.items() if any(v is not None for v in values)
        }
        if self.options.prompts is not None:
            columns["generation"] = np.arange(len(self.rows)) % self.options.generate
        return columns | {"png_bytes": num_bytes.astype(int)}


def _look(seen: np.ndarray) -> tuple[int, float]:
    """The bytes of a picture as PNG, and the variance of its pixels."""
    return int(memorization.png_bytes(seen[None])[0]), float(seen.var())


def level_at(process: pretrained.Process, share: float) -> float:
    """The noise level at a share of the training's times."""
    return float(process.schedule.sigma(share * process.num_steps / process.time_scale))


def _asked_for(pipeline: Any, prompt: str | None) -> Any:
    """A prompt; of a class-conditional pipeline a name of a class, or its number."""
    is_number = isinstance(pipeline, pretrained.ClassConditional) and (prompt or "").isdecimal()
    return int(prompt or "") if is_number else prompt


def _condition(pipeline: Any, prompt: str | None) -> Any:
    if isinstance(pipeline, pretrained.ClassConditional):
        label = (
            pipeline.num_classes if prompt is None else pipeline.index(_asked_for(pipeline, prompt))
        )
        return jnp.int32(label)
    return pipeline.embed(prompt)


@functools.cache
def _over_curves(probes: int, chunk_size: int) -> Callable[..., Any]:
    trace = linalg.rademacher(probes, chunk_size=1)

    def one(x: Any, condition: Any, base: Any, sigmas: Any, *, key: Key) -> Any:
        model = base if condition is None else base.condition(condition)
        found = lid.flipd_curve(model, x, sigmas, trace=trace, key=key)
        return jnp.stack([found.value, found.stderr])

    return mapping.over_points(one, (0, 0, None, None), chunk_size=chunk_size)
