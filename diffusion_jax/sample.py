"""Samples from a workdir: for a notebook (`load`) and for the command line (`sample`)."""

import jax
import numpy as np
import tqdm
from etils import epath

from diffusion_jax import checkpoint, from_config, images
from diffusion_jax.errors import UserError
from diffusion_jax.state import abstract_state


def load(
    workdir,
    num: int | None = None,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    clip: bool | None = None,
    dtype: str | None = None,
):
    """A sampler and the parameters of the last checkpoint, for a notebook:

        sample_fn, params = diffusion_jax.load("runs/digits", sampler="ddim", steps=50)
        x = sample_fn(params, jax.random.key(0))  # float32 [num, H, W, C] in about [-1, 1]
        more = sample_fn(params, jax.random.key(0), num)  # images num .. 2 num - 1 of the same key

    The first call compiles; all steps are one XLA program, on all devices of this process.

    Args (None: as the run's config has it):
      workdir: of a training run.
      num: images per call. Image i depends on (params, rng, i) alone, so it is the same for any.
      sampler: "ancestral", Ho et al.'s chain with the config's sigma over all T steps; "ddim";
        or "dpmpp_2m", best for few steps (10 to 20).
      steps: of ddim and dpmpp_2m, 1..T; 0 is T.
      eta: noise of ddim: 0 (none, the same latent gives the same image for any number of
        steps, nearly) to 1 (as much as the ancestral sampler's posterior).
      clip: bound the predicted x_0 to [-1, 1] inside the chain.
      dtype: of the network's computation, "float32" or "bfloat16".

    Returns:
      (sample_fn, params): see `sampling.make_sample_fn`; params are the averaged (EMA)
      parameters, float32 NumPy arrays.

    Raises:
      UserError: no run, or no checkpoint, in `workdir`; a value that cannot be used.
    """
    config = _config(workdir).copy_and_resolve_references()
    given = {"sampler": sampler, "steps": steps, "eta": eta, "clip": clip}
    config.sampling.update({key: value for key, value in given.items() if value is not None})
    config.model.dtype = dtype or config.model.dtype
    from_config.check_sampling(config)
    return from_config.sample_fn(config, num), _ema_params(config, workdir)


def load_network(workdir):
    """The network of the last checkpoint, for a sampler of your own.

    Returns:
      (apply_fn, params, s): apply_fn({"params": params}, x [B, H, W, C], t [B] in 1..T) is
      the predicted noise eps_bar [B, H, W, C]; params as of `load`; s is the Schedule.

    Raises:
      UserError: no run, or no checkpoint, in `workdir`.
    """
    config = _config(workdir)
    return from_config.network(config), _ema_params(config, workdir), from_config.schedule(config)


def sample(workdir, num: int, seed: int, out: str, **how) -> None:
    """Writes `num` images: a grid if `out` ends in .png, uint8 [num, H, W, C] if in .npz.

    The .npz has one array, "arr_0", as evaluation suites read it. Image i is the same for any `num`.
    `how` is sampler, steps and eta as of `load`.

    Raises:
      UserError: nothing to sample from, or `out` ends in something else.
    """
    out = epath.Path(out)
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out={out} must end in .png (a grid) or .npz (an array)")
    if num < 1:
        raise UserError(f"--num={num} must be at least 1")
    per_call = min(num, _config(workdir).sampling.num)
    sample_fn, params = load(workdir, per_call, **how)
    params = jax.device_put(params)
    chunks = []
    for first in tqdm.trange(0, num, per_call, desc=f"sampling {per_call} at a time", unit="call"):
        chunks.append(images.to_uint8(sample_fn(params, jax.random.key(seed), first)))
    samples = np.concatenate(chunks)[:num]
    if out.suffix == ".png":
        images.save_png(out, images.grid(samples))
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as file:
            np.savez(file, samples)
    print(f"{num} samples: {out}")


def _config(workdir):
    config = checkpoint.read_config(workdir)
    if config is None:
        raise UserError(f"--workdir={workdir} holds no run (no config.json): give the workdir of a training run")
    return config


def _ema_params(config, workdir):
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        state = checkpoint.restore(manager, abstract_state(config))
    if state is None:
        raise UserError(f"--workdir={workdir} holds no checkpoint yet: train first")
    return state.ema_params
