"""Fashion-MNIST at 28×28 grey: 60,000 images from TFDS or from the four published idx files.

    python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

For the idx files add --config.data.path=FOLDER (docs/data.md).

Known numbers: none. This project has not run the config to its end; docs/benchmarks.md has a small network by class.
"""

from diffusion_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.test_split = "test"
    config.data.source = "tfds:fashion_mnist"
    config.data.image_size = 28
    config.data.channels = 1
    config.data.flip = False  # the shoes all point to the left
    config.model.channels = 64
    config.model.multipliers = (1, 2, 2)
    config.model.attention_resolutions = (14,)
    config.train.num_steps = 100_000
    config.train.warmup_steps = 1000
    config.train.ema_decay = 0.999
    return config
