"""CelebA-HQ at 256×256, 30,000 faces: Ho et al.'s (2020) configuration.

    python main.py --config=configs/celebahq256.py --workdir=runs/celebahq256

TFDS prepares the data set from images that you download by hand. For images of your own add
--config.data.path=FOLDER_OR_ZIP (docs/data.md).

Known numbers: the paper reports 113.7M parameters and 500,000 steps, and no FID. This project has not run
the config to its end.
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
    config.sampling.num = 16  # 64 take less time per image on 8 chips: docs/performance.md
    return config
