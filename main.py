"""The command line in a checkout: python main.py --config=configs/digits.py --workdir=runs/digits."""

import sys

if __name__ == "__main__":
    try:
        from diffusion_jax import cli
    except KeyboardInterrupt:  # the imports take seconds
        sys.exit("stopped by Ctrl-C")
    sys.exit(cli.main(sys.argv))
