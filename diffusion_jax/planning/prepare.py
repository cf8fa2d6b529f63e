"""The images of a run, decoded into their cache before it starts."""

import time

from ml_collections import ConfigDict

from diffusion_jax import parts
from diffusion_jax.data import cache
from diffusion_jax.running import config as configs


def prepare(config: ConfigDict) -> None:
    """Makes the cache of a config's data set, and prints the size and the place of the images.

    Raises:
      UserError: see `sources.open_source` and `cache.open_images`.
    """
    configs.check(config)
    start = time.monotonic()
    images = parts.images(config)
    count, height, width, channels = images.shape
    place = f"cache: {images.folder}" if isinstance(images, cache.Cached) else "no cache"
    print(f"{count:,} images, {height}x{width}x{channels}, ready in {time.monotonic() - start:.1f} s; {place}")
