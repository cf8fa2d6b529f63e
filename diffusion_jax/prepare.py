"""Getting a data set ready, before the accelerators are paid for: TFDS's files, and the cache of decoded images."""

import time

from ml_collections import ConfigDict

from diffusion_jax import data, from_config


def prepare(config: ConfigDict) -> None:
    """Opens the data set of config.data, which makes its cache, and says what and where it is.

    Raises:
      UserError: see `sources.open_source` and `data.open_images`.
    """
    start = time.monotonic()
    images = from_config.images(config)
    seconds = time.monotonic() - start
    count, height, width, channels = images.shape
    where = f"cache: {images.folder}" if isinstance(images, data.Cached) else "no cache"
    print(f"{count:,} images, {height}x{width}x{channels}, ready in {seconds:.1f} s; {where}")
