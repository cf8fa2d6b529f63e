"""DDPM as pure functions in JAX and Flax.

A notebook needs `load`, `load_network` and `save_png`. The top of the package is the DDPM, e.g.
`diffusion_jax.sampling`; the wings running, data, pictures, evaluation, planning and interop take care of it and are
imported by name.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_jax.interop.export import load_exported as load_exported
    from diffusion_jax.pictures.grids import save_png as save_png
    from diffusion_jax.sample import load as load
    from diffusion_jax.sample import load_network as load_network

# Imported on first use: the mathematics alone needs neither Flax nor Orbax.
_FUNCTIONS = {
    "load": "diffusion_jax.sample",
    "load_network": "diffusion_jax.sample",
    "load_exported": "diffusion_jax.interop.export",
    "save_png": "diffusion_jax.pictures.grids",
}

_CORE = ("schedule", "process", "losses", "likelihood", "sampling", "unet", "parts", "step", "train", "sample")
__all__ = ["__version__", "load", "load_exported", "load_network", "save_png"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in _CORE:
        return importlib.import_module(f"diffusion_jax.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'diffusion_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists what there is to use."""
    return [*__all__, *_CORE]
