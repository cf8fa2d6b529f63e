"""Pictures and animations of a trained model: `figures` and `edits` applied to a run's images and checkpoint."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion_jax import parts, sample, sampling
from diffusion_jax.data import pipeline, pixels
from diffusion_jax.data.cache import Cached, OnTheFly
from diffusion_jax.errors import UserError
from diffusion_jax.pictures import edits, figures, grids
from diffusion_jax.running.config import check_integer, check_seed, choose, has_alpha, has_images, with_sampling
from diffusion_jax.running.watch import waiting
from diffusion_jax.running.workdir import absolute, read_config

FRAMES = 50  # frames of an animation
JUMPS = 25  # RePaint goes back up by T / JUMPS steps: 10 of 250 in Lugmayr et al. (2022)
REPEATS = 5  # of each step of RePaint: as many network evaluations at T = 1000 as theirs, 10 repeats of 250 steps


def read_images(config: ConfigDict, workdir: epath.PathLike, split: str | None = None) -> Cached | OnTheFly:
    """Opens the data set of a run.

    Args:
      split: replaces data.split.

    Raises:
      UserError: the data set cannot be opened; the message names the file to correct.
    """
    file = absolute(workdir) / "config.json"
    if not has_images(config):
        raise UserError(f"{file} names no images (data.path is empty, the run was imported): set data.path there")
    try:
        return parts.images(config, split)
    except UserError as error:
        raise UserError(f"{error} (data.* of this run are in {file})") from None


def show(
    workdir: epath.PathLike,
    name: str,
    seed: int,
    out: str,
    num: int | None = None,
    path: str = "",
    labels: Sequence[str] = (),
    guidance: float | None = None,
    step: int | None = None,
    ema: float | None = None,
) -> None:
    """Writes one of SHOWS: a labelled picture, or an animation.

    Args:
      seed: the seed of the noise and of the choice of images.
      out: a .png file; a .gif or .webp file for the animation.
      num: rows of the picture; images in a row of "variations"; images of the animation.
      path: images to interpolate between, to edit or to reconstruct, as config.data.path; "" means those of the run,
        and samples for "variations".
      labels: classes of a run with classes, by name or number: image i of a call has class labels[i mod len(labels)].
        () draws without a class.
      guidance, step, ema: see `diffusion_jax.load`.

    Raises:
      UserError: there is no checkpoint, there are too few images, or `out` has another suffix.
    """
    endings = (".gif", ".webp") if name == "animation" else (".png",)
    if not out.endswith(endings):
        raise UserError(f"--out={out} must end in {' or '.join(endings)} for --show={name}")
    if num is not None:
        check_integer("--num", num, 1, 2**32)
    check_seed(seed)
    run = _Run(workdir, seed, path, labels, guidance, step, ema)
    SHOWS[name](run, out, *() if num is None else (num,))
    if jax.process_index() == 0:
        print(f"{name} of step {run.step}: {out}")


class _Run:
    """A run's network, schedule and images, for the functions of `figures`, `edits` and `sampling`."""

    def __init__(self, workdir, seed, path, labels=(), guidance=None, step=None, ema=None):
        self._config = with_sampling(read_config(workdir), guidance=guidance)
        chosen = choose(self._config, labels)
        self._labels = jnp.array(chosen) if labels else None
        self._parts = parts.build(self._config)
        self.has_alpha = has_alpha(self._config)
        self.step, self._params = sample.ema_params(self._parts, workdir, step, ema)
        self.s, self.shape = self._parts.schedule, self._parts.image_shape
        self._seed, self._key = seed, jax.random.key(seed)
        self._workdir, self.path = workdir, path

    def compiled(self, formula, **static):
        """Compiles formula(eps_bar_fn, s, sigma, …, clip=clip, **static) as one program that returns NumPy arrays."""
        name = formula.__name__.replace("_", " ")

        def program(params, *arrays, **named):
            def eps_bar_fn(x, t):
                labels = None if self._labels is None else jnp.resize(self._labels, len(x))
                return self._parts.guided({"params": params}, x, t, labels)

            return formula(eps_bar_fn, self.s, self._parts.sigma, *arrays, clip=self._parts.clip, **static, **named)

        program = functools.partial(jax.jit(program), jax.device_put(self._params))

        def run(*arrays, **named):
            return waiting(f"compiling and drawing by {name}", lambda: jax.device_get(program(*arrays, **named)))

        return run

    def keys(self, num, stream=0):
        """Returns the keys of `num` images; other streams are independent."""
        return sampling.image_keys(jax.random.fold_in(self._key, stream), np.arange(num))

    def latents(self, keys):
        return sampling.normal(keys, sampling.LATENT, self.shape)

    def images(self, num, or_fewer=False):
        """Returns `num` images of the data set, chosen by the seed: float32 [num, H, W, C] in [-1, 1].

        or_fewer=True takes all images of a smaller data set. Otherwise it raises UserError.
        """
        if self.path:
            config = self._config.copy_and_resolve_references()
            config.data.source, config.data.path = "files", self.path
            dataset = parts.images(config)
        else:
            dataset = read_images(self._config, self._workdir)
        if or_fewer:
            num = min(num, len(dataset))
        if num > len(dataset):
            raise UserError(f"the picture needs {num} images, but the data set has {len(dataset)}: lower --num")
        return pixels.from_uint8(pipeline.batches(dataset, seed=self._seed, batch_size=num)[0]["image"])


def interpolation(run: _Run, out: str, num: int = 6) -> None:
    """Draws pairs of images and their mixtures at three steps t, one t per row; a larger t keeps less of them."""
    weights, steps = np.linspace(0, 1, 11, dtype=np.float32), _evenly(run.s.num_steps // 2, 3)
    mixes = [run.compiled(figures.interpolate, t=t, weights=weights) for t in steps]
    pairs = -(-num // len(steps))
    real, keys = run.images(2 * pairs).reshape(pairs, 2, *run.shape), run.keys(pairs)
    rows = [[x, *mix(x, y, key=key), y] for (x, y), key in zip(real, keys, strict=True) for mix in mixes]
    labels = [f"t = {t}" for t in steps] * pairs
    _save(run, out, rows[:num], labels[:num], ["image", *(f"{weight:.1f}" for weight in weights), "image"])


def progressive(run: _Run, out: str, num: int = 8) -> None:
    """Draws the chain's predictions of x_0 and the finished image, one image per row."""
    at = [*_evenly(run.s.num_steps, 10), 0]
    keys = run.keys(num)
    predictions = run.compiled(figures.progressive, at=at)(run.latents(keys), keys)
    _save(run, out, np.swapaxes(predictions, 0, 1), [""] * num, [f"t = {t}" for t in at])


def variations(run: _Run, out: str, num: int = 8) -> None:
    """Draws x_t and `num` images sampled from it, one t per row. A smaller t leaves them more in common.

    x_t is a state of one chain, or with --images a noised image of up to two (SDEdit).
    """
    num_steps, keys = run.s.num_steps, run.keys(num, stream=1)
    if run.path:
        return _save_edits(run, out, _evenly(num_steps // 2, 3), keys)
    first, rows, steps = run.keys(1), [], _evenly(num_steps, 4)
    x = run.latents(first)
    for start, t in zip([num_steps, *steps], steps, strict=False):
        x = run.compiled(sampling.reverse_chain, start=start, stop=t)(x, first)
        rows.append([x[0], *run.compiled(figures.variations, t=t)(x[0], keys=keys)])
    _save(run, out, rows, [f"t = {t}" for t in steps], ["x_t", *map(str, range(1, num + 1))])


def _save_edits(run, out, steps, keys):
    """Draws up to two images and the variations of each by `edits.sdedit`, one image and t per row."""
    images, edit = run.images(2, or_fewer=True), [run.compiled(edits.sdedit, t=t) for t in steps]
    rows = [[x, *at_t(np.broadcast_to(x, (len(keys), *x.shape)), keys)] for x in images for at_t in edit]
    _save(run, out, rows, [f"t = {t}" for t in steps] * len(images), ["image", *map(str, range(1, len(keys) + 1))])


def inpainting(run: _Run, out: str, num: int = 6) -> None:
    """Draws images whose lower half or centre is inpainted by one chain and by RePaint, one image per row.

    Prints the mean absolute difference across the edge of the mask for each, and for the images themselves.
    """
    if len(run.shape) != 3:
        raise UserError(
            f"--show=inpainting masks halves of images, but the run's have {run.shape}: draw another figure"
        )
    height, width, _ = run.shape
    row, column = np.ogrid[:height, :width]
    lower = row >= height // 2
    centre = (abs(row + 0.5 - height / 2) < height / 4) & (abs(column + 0.5 - width / 2) < width / 4)
    known = ~np.stack([np.broadcast_to([lower, centre][i % 2], (height, width))[..., None] for i in range(num)])
    jump = max(1, run.s.num_steps // JUMPS)
    fills = {"chain": (figures.inpaint, {}, 2), "RePaint": (edits.repaint, {"jump": jump, "repeats": REPEATS}, 3)}
    real, columns = run.images(num), dict[str, np.ndarray]()
    errors = {"image": edits.boundary_error(real, known)}
    for name, (formula, static, streams) in fills.items():
        keys = jnp.concatenate([run.keys(num, stream) for stream in range(streams)])
        images, masks = (np.concatenate([x] * streams) for x in (real, known))
        filled = run.compiled(formula, **static)(images, masks, run.latents(keys), keys)
        columns |= {f"{name} {i}": x for i, x in enumerate(np.split(filled, streams), 1)}
        errors[name] = edits.boundary_error(filled, masks).reshape(streams, num).mean(axis=0)
    rows = np.stack([real, np.where(known, real, 0), *columns.values()], axis=1)
    _save(run, out, rows, [["lower half", "centre"][i % 2] for i in range(num)], ["image", "known", *columns])
    _print("boundary error", errors)


def reconstruction(run: _Run, out: str, num: int = 6) -> None:
    """Draws images, their latents by DDIM inversion and the reconstructions, for three numbers of steps.

    Prints the root mean square error of the reconstructions. It falls as 1 / steps if the network is smooth.
    """
    real, columns, errors = run.images(num), {}, {}
    columns["image"] = real
    for steps in sorted({min(n, run.s.num_steps) for n in (10, 50, 250)}):
        ts = sampling.grid_uniform(run.s, steps)

        def formula(eps_bar_fn, s, sigma, x, clip, ts=ts):
            latent = edits.invert(eps_bar_fn, s, ts, x)
            return latent, sampling.ddim_chain(eps_bar_fn, s, ts, latent, run.keys(num))

        latent, back = run.compiled(formula)(real)
        columns |= {f"latent {steps}": latent, f"{steps} steps": back}
        errors[f"{steps} steps"] = np.sqrt(np.mean((back - real) ** 2, axis=tuple(range(1, real.ndim))))
    _save(run, out, np.stack(list(columns.values()), axis=1), [""] * num, list(columns))
    _print("reconstruction error", errors)


def animation(run: _Run, out: str, num: int = 16) -> None:
    """Writes an animation of the states x_t of `num` chains, from noise to images."""
    frames, every = [], max(1, run.s.num_steps // FRAMES)

    def report(t, x):
        frames.append((int(t), np.asarray(x)))

    window = sampling.Window(report, every, look=lambda x_t, _: x_t)
    keys = run.keys(num)
    noise = run.latents(keys)
    last = run.compiled(sampling.reverse_chain, window=window)(noise, keys)
    jax.effects_barrier()
    frames.sort(key=lambda frame: -frame[0])  # callbacks may arrive in any order
    states = [np.asarray(noise), *(x for t, x in frames if t > 0), last]
    if jax.process_index() == 0:
        grids.save_animation(out, [grids.grid(pixels.to_uint8(x), has_alpha=run.has_alpha) for x in states])


SHOWS = {
    show.__name__: show for show in (interpolation, progressive, variations, inpainting, reconstruction, animation)
}


def _evenly(num_steps, num):
    """Returns up to `num` evenly spaced steps from T down to above 0."""
    return sorted({max(1, round(num_steps * i / num)) for i in range(1, num + 1)}, reverse=True)


def _save(run, out, rows, row_labels, column_labels):
    if jax.process_index() == 0:
        tiles = pixels.to_uint8(rows).reshape(-1, *np.shape(rows)[2:])
        grids.save_png(out, grids.labelled(tiles, row_labels, column_labels, run.has_alpha))


def _print(title, errors):
    """Prints the mean and its standard error of each kind's numbers, one number for each image."""
    texts = [f"{kind} {np.mean(x):.3f} ± {np.std(x) / len(x) ** 0.5:.3f}" for kind, x in errors.items()]
    if jax.process_index() == 0:
        print(f"{title} of {len(errors.popitem()[1])} images (white is 1, black is -1): {', '.join(texts)}")
