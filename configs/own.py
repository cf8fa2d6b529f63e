"""One's own pictures at 32×32, from a folder or a zip, in a size that suits the machine.

    python main.py --config=configs/own.py --workdir=runs/own --config.data.path=pictures.zip

With a GPU or a TPU that is Ho et al.'s network for CIFAR-10 and 50,000 steps; on a CPU a small network and 4,000 steps.
`--config=configs/own.py:cpu` and `:accelerator` choose the size, e.g. to resume the run on another machine. The
grids are drawn by 25 random steps of DDIM; --mode=sample --sampler=ancestral takes all 1,000. (A network that is not
trained to the end gives noisy pictures by the samplers that add no noise, see docs/benchmarks.md, "Faces".)
"""

from diffusion_jax.configs import default
from diffusion_jax.errors import UserError
from diffusion_jax.running import hosts


def get_config(machine=""):
    if machine not in ("", "cpu", "accelerator"):
        raise UserError(f"own:{machine} is no size: give own:cpu, own:accelerator, or own, which looks at the machine")
    config = default.get_config()
    config.train.num_steps = 50_000
    config.train.ema_warmup = True
    config.sampling.sampler = "ddim"
    config.sampling.steps = 25
    config.sampling.eta = 1.0
    if machine == "cpu" or not (machine or hosts.expects_accelerator()):
        config.model.channels = 16
        config.model.multipliers = (1, 2, 4)
        config.model.num_res_blocks = 1
        config.model.attention_resolutions = (8,)
        config.model.dropout = 0.0
        config.model.num_groups = 8
        config.train.batch_size = 32
        config.train.num_steps = 4000
        config.train.learning_rate = 2e-3
        config.train.ema_decay = 0.998
        config.train.log_every = 10
    # These follow --config.train.num_steps.
    num_steps = config.train.get_ref("num_steps")
    config.train.warmup_steps = num_steps // 20
    config.train.checkpoint_every = (num_steps + 9) // 10
    config.train.sample_every = num_steps // 4
    return config
