"""The tiers of `benchmarks/memorization.py`, from exact to trained models.

Each is a module with `run(preset, seeds, out, images) -> (content, failures)`: it prints its
tables, writes its figures into the folder `out`, and returns what goes into the JSON file.
"""
