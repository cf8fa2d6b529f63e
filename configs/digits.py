"""The 1,797 handwritten digits of scikit-learn, 8×8 grey. Trains in two minutes on two CPU cores.

python main.py --config=configs/digits.py --workdir=runs/digits
"""

from diffusion_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.source = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False
    config.schedule.name = "su_linear"
    config.model.channels = 16
    config.model.multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (4,)
    config.model.dropout = 0.0
    config.model.num_groups = 8
    config.train.batch_size = 64
    config.train.num_steps = 2500
    config.train.learning_rate = 2e-3
    config.train.warmup_steps = 100
    config.train.ema_decay = 0.995
    config.train.log_every = 100
    config.train.checkpoint_every = 500
    config.train.sample_every = 0
    return config
