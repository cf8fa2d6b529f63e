"""The digits with 20 steps and a network that compiles in seconds, for the tests and tools.torture.

python main.py --config=configs/tiny.py --workdir=runs/tiny

Known numbers: none. The samples are noise.
"""

from diffusion_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.schedule.num_steps = 20
    config.model.channels = 8
    config.model.multipliers = (1,)
    config.model.num_res_blocks = 0  # on the way down
    config.model.attention_resolutions = ()
    config.model.num_groups = 4
    config.model.dropout = 0.1
    config.train.batch_size = 8
    config.train.num_steps = 6
    config.train.warmup_steps = 2
    config.train.log_every = 1
    config.train.checkpoint_every = 3
    config.sampling.num = 4
    return config
