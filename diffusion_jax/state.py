"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import from_config

# The stream of the seed that the initial weights are drawn from. Like training's it is far
# from the small numbers that sampling folds into a seed, one an image.
_INIT = 2**32 - 1


class TrainState(NamedTuple):
    """Everything a run needs to go on: the random streams and the data are functions of `step`."""

    step: Any  # int32 [], optimiser steps done
    params: Any
    ema_params: Any
    opt_state: Any


def init_state(config: ConfigDict) -> TrainState:
    """The state before the first step, NumPy arrays; a function of the config and its seed."""
    params, opt_state = jax.device_get(jax.jit(lambda: _init(config))())
    # Copies: the step gives its state's memory away, and may not give one array away twice.
    return TrainState(np.zeros((), np.int32), params, jax.tree.map(np.copy, params), opt_state)


def abstract_state(config: ConfigDict) -> TrainState:
    """The shapes and dtypes of `init_state`, without its arrays."""
    params, opt_state = jax.eval_shape(lambda: _init(config))
    return TrainState(jax.ShapeDtypeStruct((), np.int32), params, params, opt_state)


def _init(config):
    key = jax.random.fold_in(jax.random.key(config.seed), _INIT)
    x = jnp.zeros((1, *from_config.image_shape(config)))
    params = from_config.model(config).init(key, x, jnp.ones(1, jnp.int32))["params"]
    return params, from_config.optimizer(config).init(params)


def replicate(state: TrainState, axis_name: str) -> TrainState:
    """Copies the state to every device, laid out as a pmap over `axis_name` returns it (else it compiles twice)."""
    mesh = Mesh(np.array(jax.devices()), (axis_name,))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
