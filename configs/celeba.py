"""CelebA faces at 64×64: the aligned images, centre crop of 140 pixels.

    python main.py --config=configs/celeba.py --workdir=runs/celeba

TFDS provides the images, but its download from Google Drive often fails. For the folder or the zip of the
aligned 178×218 images add --config.data.path=img_align_celeba.zip (docs/data.md).

Known numbers: Ho et al. did not train on CelebA. Song et al. (DDIM, 2021, table 1) report FID 3.26 for
their DDPM with the fixed-large variance and 1000 steps. This project has not run the config to its end.
"""

from diffusion_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.source = "tfds:celeb_a"
    config.data.image_size = 64
    config.data.crop = 140
    config.model.multipliers = (1, 2, 2, 2, 4)
    config.train.num_steps = 500_000
    return config
