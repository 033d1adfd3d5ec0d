"""Stable Diffusion: counts and timings of its networks."""
