"""What training looks at every so often: the loss on held-out images, a cheap distance of samples, copies."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import from_config, losses, sampling
from diffusion_jax.evaluation import metrics, quality
from diffusion_jax.pictures import grids

HELD_OUT = 512  # images of the held-out loss
SAMPLES = 256  # of DPM-Solver++(2M) with STEPS steps
STEPS = 20
REFERENCE = 10_000  # images, at most, that samples are compared with
ENTRIES = 2**26  # pixel values, at most, of these
SHOWN = 8  # samples in the picture


class Monitor:
    """monitor(params, step, workdir, main) -> {"held_out_loss": …, …}, and a picture; see `__call__`.

    Args:
      config: of the run; held out is config.data.test_split.
      train_images: of its split to train on.
    """

    def __init__(self, config, train_images):
        self._key, self._s = jax.random.key(config.seed), from_config.schedule(config)
        self._train = _some(train_images)
        self._held_out = None
        if config.data.test_split:
            config = config.copy_and_resolve_references()
            config.data.split = config.data.test_split
            self._held_out = _some(from_config.images(config))
        self._loss = _loss_fn(from_config.network(config), self._s)
        ts = sampling.grid_log_snr(self._s, min(STEPS, self._s.num_steps))
        self._sample = sampling.make_sample_fn(
            from_config.network(config),
            self._s,
            from_config.sigma(config),
            (SAMPLES, *from_config.image_shape(config)),
            from_config.clip(config),
            lambda eps_bar_fn, s, _, x, keys, **how: sampling.dpmpp_2m_chain(eps_bar_fn, s, ts, x, **how),
        )

    def __call__(self, params, step: int, workdir, main: bool) -> dict[str, float]:
        """Of the averaged parameters; the same noise at every step.

        Returns:
          held_out_loss, (15) at steps t spread evenly over 1..T, and held_out_loss_t1 … t4 by quarter of t, if
          there is a held-out split; frechet_pixels, of SAMPLES samples of a fast sampler to the held-out images
          (else to training images), biased upwards by so few but by as much each time; nearest_training_image, the
          median distance of samples to their nearest training image, also in pixels. The nearest are
          drawn in samples/nearest-<step>.png by process `main`.
        """
        found = {}
        if self._held_out is not None:
            found |= self._loss_by_quarter(params)
        generated = grids.to_uint8(self._sample(params, self._key))
        x, train = quality.pixels(generated), quality.pixels(self._train)
        reference = train if self._held_out is None else quality.pixels(self._held_out)
        found["frechet_pixels"] = metrics.frechet_of_features(x, reference)
        distance, index = metrics.nearest(x, train)
        found["nearest_training_image"] = float(np.median(distance))
        if main:
            path = workdir / "samples" / f"nearest-{step}.png"
            grids.save_png(path, nearest_pairs(generated, self._train, index, distance))
        return found

    def _loss_by_quarter(self, params):
        devices, n = jax.local_device_count(), min(HELD_OUT, len(self._held_out))
        numbers = np.arange(-(-n // devices) * devices)  # the last few fill up, and are dropped
        t = 1 + numbers % n * self._s.num_steps // n
        shaped = [x.reshape(devices, -1, *x.shape[1:]) for x in (self._held_out[numbers % n], t, numbers)]
        each = np.asarray(self._loss(params, self._key, *shaped)).reshape(-1)[:n]
        quarter = (t[:n] - 1) * 4 // self._s.num_steps
        by_quarter = {f"held_out_loss_t{i + 1}": float(each[quarter == i].mean()) for i in np.unique(quarter)}
        return {"held_out_loss": float(each.mean())} | by_quarter


def nearest_pairs(generated, train, index, distance) -> np.ndarray:
    """A labelled picture of the samples that are closest to a training image, and these.

    Args:
      generated: uint8 [n, H, W, C].
      train: the training images; index: int [n], of the one nearest to each sample; distance: [n].
    """
    closest = np.argsort(distance)[:SHOWN]
    pairs = np.concatenate([generated[closest], train[index[closest]]])
    return grids.labelled(pairs, ["sample", "nearest"], [f"{distance[i]:.2f}" for i in closest])


def _some(dataset):
    """Up to REFERENCE images, spread over all, uint8 in memory."""
    size = int(np.prod(dataset.shape[1:]))
    n = min(len(dataset), REFERENCE, max(SAMPLES, ENTRIES // size))
    return dataset[np.linspace(0, len(dataset) - 1, n).round().astype(int)]


def _loss_fn(apply_fn, s):
    """(params, rng, pixels [D, B, H, W, C], t [D, B], numbers [D, B]) -> (15) [D, B]."""
    loss = losses.with_noise(losses.simple_loss, 1)

    def each(params, rng, pixels, t, numbers):
        x_0 = pixels.astype(jnp.float32) / 127.5 - 1
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, numbers)
        return loss(lambda x, t: apply_fn({"params": params}, x, t), s, x_0, t, keys)

    return jax.pmap(each, in_axes=(None, None, 0, 0, 0))
