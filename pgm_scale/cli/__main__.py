"""`python -m pgm_scale.cli`, as torchrun starts it."""

import sys

from pgm_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
