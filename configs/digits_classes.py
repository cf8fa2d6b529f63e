"""The digits of configs/digits.py with their ten classes, for guided samples. Trains in two minutes on two CPU cores.

python main.py --config=configs/digits_classes.py --workdir=runs/digits_classes
python main.py --mode=sample --workdir=runs/digits_classes --num=80 --guidance=2 --out=digits.png
"""

from diffusion_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.model.num_classes = "auto"
    return config
