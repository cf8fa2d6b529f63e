"""LSUN at 256×256 (church; bedroom and cat differ in the steps): Ho et al.'s (2020) configuration.

    python main.py --config=configs/lsun.py --workdir=runs/church

From TFDS; with images of your own add --config.data.path=FOLDER_OR_ZIP (docs/data.md).

Known numbers, of the paper (table 3): FID 7.89 on church after 1.2M steps, 6.36 on
bedroom after 2.4M, 19.75 on cat after 1.8M. Not run to its end here.
"""

from diffusion_jax.configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.source = "tfds:lsun/church_outdoor"
    config.train.num_steps = 1_200_000
    return config
