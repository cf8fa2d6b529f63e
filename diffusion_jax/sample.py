"""Samplers and networks from a workdir, for a notebook."""

from collections.abc import Callable

from etils import epath

from diffusion_jax import parts
from diffusion_jax.errors import UserError
from diffusion_jax.parts import Parts
from diffusion_jax.running import checkpoint, history, measured, snapshots, watch
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs
from diffusion_jax.schedule import Schedule


def load(
    workdir: epath.PathLike,
    num: int | None = None,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    clip: bool | None = None,
    dtype: str | None = None,
    guidance: float | None = None,
    schedule: Callable | None = None,
    sigma: str | Callable | None = None,
    grid: str | None = None,
    step: int | None = None,
    ema: float | None = None,
    progress: bool = False,
) -> tuple[Callable, dict]:
    """Loads the sampler and the parameters of the last checkpoint, for a notebook.

        sample_fn, params = diffusion_jax.load("runs/digits", sampler="ddim", steps=50)
        x = sample_fn(params, jax.random.key(0))  # float32 [num, H, W, C] in about [-1, 1]
        more = sample_fn(params, jax.random.key(0), num)  # images num .. 2 num - 1 of the same key
        threes = sample_fn(params, jax.random.key(0), labels=3)  # of a run with classes; default: all in turn

    The first call compiles, and says so on stderr. All steps are one XLA program, on all devices of this process.

    Args (None means the value in the run's config):
      workdir: the workdir of a training run.
      num: images per call. Image i depends on (params, rng, i) alone, so it is the same for any num.
      sampler: "ancestral", Ho et al.'s chain with the config's sigma over all T steps; "ddim";
        or "dpmpp_2m", best for few steps (10 to 20).
      steps: steps of ddim and dpmpp_2m, 1..T; 0 means T.
      eta: noise of ddim and dpmpp_2m: from 0 (none; the same latent gives nearly the same image for any number of
        steps) to 1 (as much as the ancestral sampler's posterior).
      clip: True bounds the predicted x_0 to [-1, 1] inside the chain.
      dtype: dtype of the computation, "float32" or "bfloat16".
      guidance: weight of classifier-free guidance, for a run with classes: 1 is the plain conditional model, more
        brings images nearer to their class and to each other.
      schedule: the function that the run was trained with, if it has its own, see `train.train`.
      sigma: "zero", "beta", "posterior", "learned", "analytic", or a function Schedule -> [T + 1].
      grid: "uniform", "quadratic", "log_snr" or "bound", the steps of ddim and dpmpp_2m. This one and sigma "analytic"
        use what the last `--mode=evaluate` measured.
      step: the step of the checkpoint; None is the last.
      ema: the relative length of another average of the parameters, up to 0.2886, for a run with train.snapshot_every:
        the deviation of its weights over the steps, divided by the step. None is that of train.ema_decay.
      progress: True shows a bar of the steps with speed and time left; the images stay the same.

    Returns:
      (sample_fn, params): see `sampling.make_sample_fn`; params are the averaged (EMA) parameters,
      float32 NumPy arrays.

    Raises:
      UserError: `workdir` holds no run or no checkpoint, or a value cannot be used.
    """
    own, name = (sigma, None) if callable(sigma) else (None, sigma)
    settings = sampler, steps, eta, clip, dtype, num, guidance, name, grid
    config = configs.with_sampling(workdirs.read_config(workdir), *settings)
    config = configs.with_functions(config, schedule=schedule, sigma=own)
    run = parts.build(config, measured.read(workdir, config, step, ema))
    window = watch.progress_window(run.num_sampling_steps, run.num_samples) if progress else None
    sample_fn, text = run.sample_fn(window=window), f"compiling, and drawing {run.num_samples:,} images"
    return sample_fn if progress else watch.told(sample_fn, text), ema_params(run, workdir, step, ema)[1]


def load_network(
    workdir: epath.PathLike, step: int | None = None, *, schedule: Callable | None = None, ema: float | None = None
) -> tuple[Callable, dict, Schedule]:
    """Loads the network of the last checkpoint, or that of `step`, for a sampler of your own.

    Returns:
      (apply_fn, params, s): apply_fn({"params": params}, x [B, H, W, C], t [B] in 1..T, labels=None) is the predicted
      noise ε̄ [B, H, W, C], with labels [B] for a run with classes; params are those of `load`; s is the Schedule.

    Raises:
      UserError: `workdir` holds no run or no checkpoint.
    """
    run = parts.build(configs.with_functions(workdirs.read_config(workdir), schedule=schedule))
    return run.network, ema_params(run, workdir, step, ema)[1], run.schedule


def ema_params(
    run: Parts, workdir: epath.PathLike, step: int | None = None, ema: float | None = None
) -> tuple[int, dict]:
    """Returns (step, averaged parameters) of the last checkpoint, or that of `step`; reads nothing else of it.

    Raises:
      UserError: there is no checkpoint, none can be read, it is not of config.json's run; see `snapshots.average`.
    """
    like = snapshots.needed(run.abstract_state(), ema)
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        state = checkpoint.restore(manager, like) if step is None else checkpoint.restore_step(manager, like, step)
        if state is None:
            raise UserError(f"--workdir={workdir} holds no checkpoint yet: train first")
        about = checkpoint.read_about(manager, int(state.step))
    folder, config, number = workdirs.absolute(workdir), workdirs.read_config(workdir), int(state.step)
    return number, snapshots.average(folder, history.identity(folder, config, about, number), state, ema)
