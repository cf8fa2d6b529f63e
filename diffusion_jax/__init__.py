"""DDPM as pure functions in JAX and Flax.

`load` and `load_network` are what a notebook needs; the modules are imported by name,
e.g. `from diffusion_jax import schedule, sampling`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_jax.interop.export import load_exported
    from diffusion_jax.sample import load, load_network

__all__ = ["load", "load_exported", "load_network"]


def __getattr__(name):
    """Imports on first use: the mathematics alone needs neither Flax nor Orbax."""
    if name in __all__:
        module = "diffusion_jax.interop.export" if name == "load_exported" else "diffusion_jax.sample"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'diffusion_jax' has no attribute {name!r}")
