"""`python -m mmh_jax`, the same as `mmh-jax`."""

import sys

from mmh_jax.cli import main

sys.exit(main())
