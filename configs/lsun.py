"""LSUN church at 256×256: Ho et al.'s (2020) configuration. Bedroom and cat differ in the number of steps.

    python main.py --config=configs/lsun.py --workdir=runs/church

TFDS provides the images. For images of your own add --config.data.path=FOLDER_OR_ZIP (docs/data.md).

Known numbers: the paper (table 3) reports FID 7.89 for church after 1.2M steps, 6.36 for bedroom after 2.4M,
and 19.75 for cat after 1.8M. This project has not run the config to its end.
"""

from diffusion_jax.configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.source = "tfds:lsun/church_outdoor"
    config.train.num_steps = 1_200_000
    return config
