"""Measurements during training: held-out loss, a cheap distance of samples, and copies of training images."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion_jax import losses, parts, process, sampling
from diffusion_jax.data import pixels
from diffusion_jax.data.cache import Cached, OnTheFly
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import metrics, quality
from diffusion_jax.parts import Parts
from diffusion_jax.pictures import grids
from diffusion_jax.schedule import Schedule

HELD_OUT = 512  # images of the held-out loss
SAMPLES = 256  # samples of DPM-Solver++(2M) with STEPS steps
STEPS = 20
REFERENCE = 10_000  # largest number of images that samples are compared with
ENTRIES = 2**26  # largest number of pixel values of these images
SHOWN = 8  # samples in the picture


class Monitor:
    """Measures a run: monitor(params, step, workdir) -> {"held_out_loss": …, …}, and a picture.

    Args:
      run: the parts of the run.
      train_images: the training images.
      held_out: held-out images, or None.

    Raises:
      UserError: there are fewer than 2 images to compare samples with, or the held-out images have other classes.
    """

    def __init__(self, run: Parts, train_images: Cached | OnTheFly, held_out: Cached | OnTheFly | None = None) -> None:
        if (n := len(train_images if held_out is None else held_out)) < 2:
            raise UserError(
                f"train.evaluate_every compares samples with at least 2 images, not {n}: give a larger "
                f"data.{'split' if held_out is None else 'test_split'}, or train.evaluate_every=0"
            )
        self._labels = None
        if run.num_classes and held_out is not None:
            if tuple(held_out.classes) != tuple(train_images.classes):
                raise UserError("data.test_split has other classes than data.split: give a split with the same")
            self._labels = held_out.examples(_spread(held_out))["label"]
        self._key, self._num_steps = jax.random.key(run.seed), run.schedule.num_steps
        self._per_call = run.num_samples
        self._train, self._has_alpha = _some(train_images), not train_images.array_dtype
        self._held_out = None if held_out is None else _some(held_out)
        self._loss = _loss_fn(run.network, run.schedule)
        ts = sampling.grid_log_snr(run.schedule, min(STEPS, self._num_steps))
        self._sample = sampling.make_sample_fn(
            run.network,
            run.schedule,
            run.sigma,
            (min(SAMPLES, run.num_samples), *run.image_shape),  # what fits for a grid fits here
            run.clip,
            lambda eps_bar_fn, s, _, x, keys, **options: sampling.dpmpp_2m_chain(eps_bar_fn, s, ts, x, **options),
            num_classes=run.num_classes,
        )

    def __call__(self, params: dict, step: int, workdir: epath.Path) -> dict[str, float]:
        """Measures the averaged parameters, with the same noise at every step, with the labels of a run with classes.

        Returns:
          held_out_loss, (15) at steps t spread evenly over 1..T, and held_out_loss_t1 … t4 by quarter of t, if
          there are held-out images; frechet_pixels, the distance of SAMPLES samples of a fast sampler to the
          held-out (else the training) images, biased upwards by so few samples, by the same amount each time;
          nearest_training_image, the median distance in pixels of samples to their nearest training
          image. Process 0 draws the nearest pairs in samples/nearest-<step>.png.
        """
        values: dict[str, float] = {}
        if self._held_out is not None:
            values |= self._loss_by_quarter(params)
        generated = self._generated(params)
        x, train = quality.pixels(generated), quality.pixels(self._train)
        reference = train if self._held_out is None else quality.pixels(self._held_out)
        values["frechet_pixels"] = metrics.frechet_of_features(x, reference)
        distance, index = metrics.nearest(x, train)
        values["nearest_training_image"] = float(np.median(distance))
        if jax.process_index() == 0:
            path = workdir / "samples" / f"nearest-{step}.png"
            grids.save_png(path, nearest_pairs(generated, self._train, index, distance, self._has_alpha))
        return values

    def _generated(self, params):
        params = jax.device_put(params)
        calls = [self._sample(params, self._key, first) for first in range(0, SAMPLES, self._per_call)]
        return pixels.to_uint8(np.concatenate(calls)[:SAMPLES])

    def _loss_by_quarter(self, params):
        devices, n = jax.local_device_count(), min(HELD_OUT, len(self._held_out))
        per_call = -(-min(n, self._per_call) // devices) * devices
        numbers = np.arange(-(-n // per_call) * per_call)  # padded; the padding is dropped below
        t, labels = 1 + numbers % n * self._num_steps // n, self._labels
        each = []
        for i in np.split(numbers, len(numbers) // per_call):
            batch = self._held_out[i % n], t[i], i, None if labels is None else labels[i % n]
            shaped = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
            each.append(np.asarray(self._loss(params, self._key, *shaped)).reshape(-1))
        each, t = np.concatenate(each)[:n], t[:n]
        quarter = (t - 1) * 4 // self._num_steps
        by_quarter = {f"held_out_loss_t{i + 1}": float(each[quarter == i].mean()) for i in np.unique(quarter)}
        return {"held_out_loss": float(each.mean())} | by_quarter


def build(config: ConfigDict, run: Parts, images: Cached | OnTheFly) -> Monitor:
    """Builds the monitor of a training on `images`, with the held-out images of data.test_split if there are any.

    Raises:
      UserError: see `parts.images` and `Monitor`.
    """
    return Monitor(run, images, parts.images(config, config.data.test_split) if config.data.test_split else None)


def nearest_pairs(
    generated: np.ndarray, train: np.ndarray, index: np.ndarray, distance: np.ndarray, has_alpha: bool = True
) -> np.ndarray:
    """Draws the samples that are closest to a training image, each above that image.

    Args:
      generated: uint8 [n, H, W, C].
      train: the training images, uint8, or float32 in [−1, 1].
      index: int [n], index of the training image nearest to each sample.
      distance: [n], distance to that image.
      has_alpha: see `grids.grid`.
    """
    closest = np.argsort(distance)[:SHOWN]
    pairs = np.concatenate([generated[closest], pixels.to_uint8(train[index[closest]])])
    return grids.labelled(pairs, ["sample", "nearest"], [f"{distance[i]:.2f}" for i in closest], has_alpha)


def _some(dataset):
    """Returns up to REFERENCE images, spread over all, uint8 in memory."""
    return dataset[_spread(dataset)]


def _spread(dataset):
    """Returns the indices of up to REFERENCE images, spread over all."""
    size = int(np.prod(dataset.shape[1:]))
    n = min(len(dataset), REFERENCE, max(SAMPLES, ENTRIES // size))
    return np.linspace(0, len(dataset) - 1, n).round().astype(int)


def _loss_fn(apply_fn: Callable, s: Schedule) -> Callable:
    """Returns (params, rng, images uint8 [D, B, H, W, C], t, numbers, labels or None, [D, B] each) -> (15) [D, B]."""
    loss = losses.with_noise(losses.simple_loss, 1)

    def each(params, rng, images, t, numbers, labels):
        keys, of = sampling.image_keys(rng, numbers), () if labels is None else (labels,)

        def eps_bar_fn(x, t):
            return process.prediction(apply_fn({"params": params}, x, t, *of)).eps_bar

        return loss(eps_bar_fn, s, pixels.from_uint8(images), t, keys)

    return jax.pmap(each, in_axes=(None, None, 0, 0, 0, 0))
