"""Make the fixtures in this folder: what PyTorch modules answer, for weights that NumPy draws.

    python tests/data/pretrained/make.py [family ...]

needs torch, diffusers and transformers.  The tests read the files without them.
"""

import sys
from pathlib import Path

import make_clip
import make_tokenizer

FAMILIES = {
    "clip": make_clip.make,
    "tokenizer": make_tokenizer.make,
}

if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        FAMILIES[family](Path(__file__).parent)
