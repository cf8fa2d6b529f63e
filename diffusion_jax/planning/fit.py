"""Memory and time of a train step on the devices at hand, and the options that save memory."""

import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.planning import programs
from diffusion_jax.running.watch import waiting
from diffusion_jax.step import TrainState

TIGHT = 0.9  # share of a device's memory above which the step gets a warning


def foresee(config: ConfigDict, program: jax.stages.Wrapped, args: tuple, num_steps: int) -> float | None:
    """Compiles the step, and prints its memory and the least time of the remaining steps if the device has a limit.

    Only a program that does not fit stops the run: an estimate that fails for another reason is skipped.

    Args:
      program: the pmapped step.
      args: the arguments of its first call, or their shapes.
      num_steps: number of remaining steps.

    Returns:
      The least seconds of a step, its FLOPs by the peak of the device; None if they are not known.

    Raises:
      UserError: the program does not fit into a device.
    """
    device = jax.local_devices()[0]
    room = programs.room(device)
    try:  # JAX keeps the program: the first step does not compile again
        compiled = waiting("compiling the train step", lambda: programs.compiled(program.lower(*args)))
        if not room:
            return None
        peak, flops = programs.memory_needed(compiled), programs.model_flops(jax.make_jaxpr(program)(*args).jaxpr)
    except programs.DoesNotFit as error:
        raise does_not_fit(config, device.device_kind, programs.shortage(error)) from None
    except Exception as error:  # a backend may fail in ways of its own
        print(f"no estimate of memory and time ({one_line(error, 200)})")
        return None
    if peak is None:
        return None
    sizes = f"{peak / 2**30:.2f} of {room / 2**30:.2f} GiB"
    if peak > room:
        raise does_not_fit(config, device.device_kind, sizes)
    chip = programs.chip_of(device)
    loops = parts_of_device(config) if config.train.deterministic else 1  # of a length that XLA must not know
    seconds = flops * loops / chip.flops if chip else None
    if jax.process_index() == 0 and seconds:
        hours = seconds * num_steps / 3600
        print(f"estimate: at least {seconds * 1e3:.3g} ms a step, {hours:.3g} hours to the end; {sizes} a device")
    if jax.process_index() == 0 and peak > TIGHT * room:
        print(f"warning: the step takes {sizes} of a device: if it runs out of memory, {remedies(config)}")
    return seconds


def parts_of_device(config: ConfigDict, num_devices: int | None = None) -> int:
    """Returns the parts that a device computes in a step one after another."""
    parts = config.train.accumulate
    return parts // (num_devices or jax.device_count()) if config.train.deterministic else parts


def foresee_sampler(config: ConfigDict, sample_fn: Any, state: TrainState) -> None:
    """Compiles the sampler of the grids, if the device reports its memory: a run would fail at its first grid.

    Args:
      sample_fn: see `sampling.make_sample_fn`.
      state: the training state, which stays on the device.

    Raises:
      UserError: the sampler does not fit into a device beside the state.
    """
    device = jax.local_devices()[0]
    room, held = programs.room(device), sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if not room:
        return
    mend = f"lower config.sampling.num={config.sampling.num}, or set config.model.dtype=bfloat16"
    try:
        lower = functools.partial(sample_fn.lower, state.ema_params, jax.random.key(config.seed))
        compiled = waiting("compiling the sampler", lambda: programs.compiled(lower()))
        peak = programs.memory_needed(compiled)
    except programs.DoesNotFit as error:
        shortage = programs.shortage(error)
        raise UserError(f"the sampler does not fit into a {device.device_kind} ({shortage}): {mend}") from None
    except Exception as error:  # a backend may fail in ways of its own
        print(f"no estimate of the sampler's memory ({one_line(error, 200)})")
        return
    if peak is not None and held + peak > room:
        sizes = f"{held / 2**30:.2f} for the state and {peak / 2**30:.2f} of {room / 2**30:.2f} GiB"
        raise UserError(f"the sampler does not fit into a {device.device_kind} ({sizes}): {mend}")


def does_not_fit(config: ConfigDict, device: str, sizes: str) -> UserError:
    """Returns the error for a train step that is too large for a device."""
    return UserError(
        f"config.train.batch_size={config.train.batch_size} does not fit into a {device} ({sizes}): {remedies(config)}"
    )


def remedies(config: ConfigDict) -> str:
    """Returns the memory-saving options that are not enabled yet, in words."""
    train = config.train
    options = [
        None if config.model.dtype == "bfloat16" else "config.model.dtype=bfloat16",
        None if train.remat else "config.train.remat=True",
        f"config.train.accumulate={2 * train.accumulate}",
        "config.data.on_device=False" if config.data.on_device else None,
    ]
    return f"set {', '.join(filter(None, options))}, lower config.train.batch_size, or take more devices"
