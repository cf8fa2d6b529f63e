"""CIFAR-10, 32×32: Ho et al.'s (2020) own configuration, to the hyper-parameter.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

From TFDS; with images of your own add --config.data.path=FOLDER_OR_ZIP (docs/data.md).

Known numbers, of the paper (table 1): FID 3.17 and inception score 9.46 on 50,000
samples after 800,000 steps; 35.7M parameters. Not run to its end here.
"""

from diffusion_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.test_split = "test"
    config.data.source = "tfds:cifar10"
    return config
