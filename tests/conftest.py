"""Every test runs on 4 CPU devices; silent broadcasting between ranks is an error."""

import jax
import pytest

from diffusion_jax import schedule

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rough():
    """Four steps as unlike each other as can be: an index that is off by one shows."""
    return schedule.from_beta_squared([0.3, 0.05, 0.6, 0.2])
