"""CIFAR-10 at 32×32: Ho et al.'s (2020) configuration, with all of its hyperparameters.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

TFDS provides the images. For images of your own add --config.data.path=FOLDER_OR_ZIP (docs/data.md).

Known numbers: the paper (table 1) reports FID 3.17 and Inception score 9.46 of 50,000 samples after
800,000 steps, with 35.7M parameters. This project has not run the config to its end.
"""

from diffusion_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.test_split = "test"
    config.data.source = "tfds:cifar10"
    return config
