"""`pipeline.safetensors`: what diffusers' pipelines answer for the folders of `pretrained_folders`.

For each kind the latents (images of `ddpm`) after some steps of its scheduler with guidance, and
the image of the first; for `sd1` FLIPD of the conditional model at a latent, by PyTorch's own
derivatives, with the published scaled-linear schedule.
"""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pretrained_folders as folders
from safetensors.numpy import save_file

NAMES = {
    "xl": "StableDiffusionXLPipeline", "ddpm": "DDIMPipeline", "dit": "DiTPipeline",
    "sd3": "StableDiffusion3Pipeline",
}  # fmt: skip
TIME = 250


def loaded(kind, folder):
    import diffusers

    # What an index leaves out has to be left out once more.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    named = getattr(diffusers, NAMES.get(kind, "StableDiffusionPipeline"))
    made = named.from_pretrained(folder, **absent)
    made.set_progress_bar_config(disable=True)
    return made


def batch(array):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def images(tensor):
    return np.ascontiguousarray(tensor.numpy().transpose(0, 2, 3, 1))


def answers(kind, folder):
    """Latents of both prompts or labels, and the image of the first."""
    import torch

    if kind == "dit":
        return answers_of_classes(folder)
    pipeline, noise = loaded(kind, folder), batch(folders.noise(kind))
    with torch.no_grad():
        if kind == "ddpm":
            scheduler, x = pipeline.scheduler, noise
            scheduler.set_timesteps(folders.STEPS)
            for t in scheduler.timesteps:
                x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
            return {"latents": images(x)}
        options = {"num_inference_steps": folders.STEPS, "guidance_scale": folders.SCALE}
        size = {"height": 16, "width": 16} if kind in ("xl", "sd3") else {}
        found = [
            images(
                pipeline(prompt, latents=z[None], output_type="latent", **options, **size).images
            )
            for prompt, z in zip(folders.PROMPTS, noise, strict=True)
        ]
        image = pipeline(
            folders.PROMPTS[0], latents=noise[:1], output_type="np", **options, **size
        ).images
    return {"latents": np.concatenate(found), "image": np.ascontiguousarray(image[0])}


def answers_of_classes(folder):
    """The pipeline of DiT draws its noise itself, and answers with images alone."""
    import torch

    pipeline, noise = loaded("dit", folder), batch(folders.noise("dit"))
    scale = pipeline.vae.config.scaling_factor
    decode, seen = pipeline.vae.decode, []

    def decoded(latents):
        seen.append(scale * latents)
        return decode(latents)

    draw = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    with (
        torch.no_grad(),
        mock.patch.object(pipeline.vae, "decode", decoded),
        mock.patch(draw, return_value=noise),
    ):
        found = pipeline(
            folders.LABELS,
            guidance_scale=folders.SCALE,
            num_inference_steps=folders.STEPS,
            output_type="np",
        ).images
    return {"latents": images(seen[0]), "image": np.ascontiguousarray(found[0])}


def flipd(folder, alpha_bar=None):
    """tr dD/dx + |x - D|^2 / sigma^2 of the first prompt at the first noise, exactly.

    x_t = noise itself, at `TIME`; `alpha_bar` of the published schedule unless given.
    """
    import torch

    pipeline = loaded("sd1", folder)
    alpha_bar = pipeline.scheduler.alphas_cumprod[TIME] if alpha_bar is None else alpha_bar
    alpha, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    context = pipeline.encode_prompt(folders.PROMPTS[0], "cpu", 1, False)[0].detach()
    for parameter in pipeline.unet.parameters():
        parameter.requires_grad_(False)
    point = batch(folders.noise("sd1")[:1]) / alpha

    def denoise(x):
        noise = pipeline.unet(alpha * x, torch.tensor(TIME), context).sample
        return (alpha * x - s * noise) / alpha

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(denoise, point)
    trace = jacobian.reshape(point.numel(), point.numel()).trace()
    residual = ((point - denoise(point)) ** 2).sum() / (s / alpha) ** 2
    return float(trace + residual)


def make(here):
    found = {}
    for kind in folders.SCHEDULERS:
        with tempfile.TemporaryDirectory() as folder:
            folders.write(kind, Path(folder) / "model")
            for name, array in answers(kind, Path(folder) / "model").items():
                found[f"{kind}.{name}"] = array.astype(np.float32)
            if kind == "sd1":
                found["sd1.flipd"] = np.float64([flipd(Path(folder) / "model")])
    save_file(found, here / "pipeline.safetensors")
