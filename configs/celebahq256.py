"""CelebA-HQ at 256×256, 30,000 faces: Ho et al.'s (2020) configuration.

    python main.py --config=configs/celebahq256.py --workdir=runs/celebahq256

From TFDS (which has to be given the images by hand), or with images of your own:
add --config.data.path=FOLDER_OR_ZIP (docs/data.md).

Known numbers, of the paper: 113.7M parameters, 500,000 steps; it shows samples and gives
no FID. Not run to its end here.
"""

from diffusion_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.source = "tfds:celeb_a_hq/256"
    config.data.image_size = 256
    config.model.multipliers = (1, 1, 2, 2, 4, 4)
    config.model.dropout = 0.0
    config.train.num_steps = 500_000
    config.train.batch_size = 64
    config.train.learning_rate = 2e-5
    config.sampling.sigma = "posterior"
    config.sampling.num = 16  # on 8 chips 64 take less time an image: docs/performance.md
    return config
