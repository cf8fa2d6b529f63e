"""DDPM as pure functions in JAX and Flax.

`load` and `load_network` are what a notebook needs; the modules are imported by name,
e.g. `from diffusion_jax import schedule, sampling`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_jax.sample import load, load_network

__all__ = ["load", "load_network"]


def __getattr__(name):
    """Imports on first use: the mathematics alone needs neither Flax nor Orbax."""
    if name in __all__:
        from diffusion_jax import sample

        return getattr(sample, name)
    raise AttributeError(f"module 'diffusion_jax' has no attribute {name!r}")
