"""Getting a data set ready, before the accelerators are paid for: TFDS's files, and the cache of decoded images."""

import time

from ml_collections import ConfigDict

from diffusion_jax import from_config
from diffusion_jax.data import pipeline


def prepare(config: ConfigDict) -> None:
    """Opens the data set of config.data, which makes its cache, and says what and where it is.

    Raises:
      UserError: see `sources.open_source` and `pipeline.open_images`.
    """
    start = time.monotonic()
    images = from_config.images(config)
    seconds = time.monotonic() - start
    count, height, width, channels = images.shape
    where = f"cache: {images.folder}" if isinstance(images, pipeline.Cached) else "no cache"
    print(f"{count:,} images, {height}x{width}x{channels}, ready in {seconds:.1f} s; {where}")
