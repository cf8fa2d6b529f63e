"""CIFAR-10 with its ten classes: Ho et al.'s (2020) network and hyperparameters, and an embedding of the class.

    python main.py --config=configs/cifar10_classes.py --workdir=runs/cifar10_classes

One label in ten is dropped, so that `sampling.guidance` can weigh the class (Ho & Salimans 2022). This project has not
run the config to its end.
"""

from diffusion_jax.configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.model.num_classes = "auto"
    return config
