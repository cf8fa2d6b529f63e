"""The command line in a checkout: python main.py --config=configs/digits.py --workdir=runs/digits."""

import sys

from diffusion_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv))
