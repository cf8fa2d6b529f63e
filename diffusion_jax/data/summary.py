"""What a data set holds, in numbers, and what in it looks like a mistake."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

NEARLY_CONSTANT = (
    8  # levels between the least and the largest of a channel: a blank JPEG has as many by its compression
)
CONSTANT_SHARE = 0.001  # of the images: samples hardly show fewer
COPIES_SHARE = 0.01  # of the images: large collections have a few copies, which hardly change the loss
UNSCALED = 1  # the largest value: floats in [0, 1] that were cast to uint8 are 0 or 1
NARROW = 32  # levels, an eighth of all: even dark or hazy photographs use more over a whole data set
FEW = 100  # images: fewer than the default batch of 128, so that every batch could hold all of them


class Summary(NamedTuple):
    """Numbers of a set of images."""

    num: int  # images
    lowest: tuple[int, ...]  # value of each channel, 0..255
    highest: tuple[int, ...]
    means: tuple[float, ...]  # of each channel, 0..255
    nearly_constant: int  # images whose channels each vary by at most NEARLY_CONSTANT levels
    copies: int  # images with the same pixels as an earlier one
    is_grey: bool  # three channels that are equal in every pixel
    labels: np.ndarray | None  # int32 [num]; None without classes


class _Block(NamedTuple):
    """Numbers of a block of images, from which those of all blocks follow exactly."""

    num_pixels: int
    lowest: np.ndarray  # uint8 [C]
    highest: np.ndarray
    sums: np.ndarray  # uint64 [C]
    nearly_constant: int
    hashes: np.ndarray  # int64 [n]
    is_grey: bool


def summarize(batches: Iterable[dict[str, np.ndarray]]) -> Summary:
    """Returns the numbers of all images. Keeps 12 bytes of an image, so batches that are read in turn need not fit.

    Args:
      batches: at least one; "image" is uint8 [n, H, W, C] with n ≥ 1, "label" int32 [n] where there are classes.
    """
    blocks, labels = [], []
    for batch in batches:
        blocks.append(_block(batch["image"]))
        labels += [batch["label"]] if "label" in batch else []
    hashes = np.concatenate([block.hashes for block in blocks])
    means = sum(block.sums for block in blocks) / sum(block.num_pixels for block in blocks)
    return Summary(
        num=len(hashes),
        lowest=tuple(np.min([block.lowest for block in blocks], axis=0).tolist()),
        highest=tuple(np.max([block.highest for block in blocks], axis=0).tolist()),
        means=tuple(means.tolist()),
        nearly_constant=sum(block.nearly_constant for block in blocks),
        copies=len(hashes) - len(np.unique(hashes)),
        is_grey=all(block.is_grey for block in blocks),
        labels=np.concatenate(labels) if labels else None,
    )


def _block(x):
    # Reduces one axis at a time: with the short axis of the channels innermost NumPy takes several times as long.
    x = x.reshape(len(x), -1, *x.shape[-2:])  # signals and volumes as images
    low, high = x.min(1).min(1), x.max(1).max(1)
    sums = x.sum(0, dtype=np.uint64).sum((0, 1))
    return _Block(
        num_pixels=x[..., 0].size,
        lowest=low.min(0),
        highest=high.max(0),
        sums=sums,
        nearly_constant=int(((high - low).max(-1) <= NEARLY_CONSTANT).sum()),
        hashes=np.array([hash(image.tobytes()) for image in x]),  # SipHash: 64 bits, and the fastest at hand
        is_grey=x.shape[-1] == 3 and bool(np.ptp(sums) == 0 and (x == x[..., :1]).all()),  # the sums decide quickly
    )


def class_counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """Returns the number of images of each class by its name, 0 included.

    Args:
      labels: int [N], each below len(classes).
      classes: the names of the classes.
    """
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def warnings(
    summary: Summary, counts: Mapping[str, int], *, has_alpha: bool = False, has_range: bool = False
) -> list[str]:
    """Returns a line for each thing that looks like a mistake: what was found, and what to do.

    Args:
      counts: the number of images of each class, see `class_counts`; {} if the images are a part of the data set.
      has_alpha: True if the last of four channels is alpha.
      has_range: True if config.data.range made the levels.
    """
    values, images = _about_values(summary, has_alpha, has_range), _about_images(summary)
    return [*values, *images, *_about_classes(counts)]


def _about_values(summary, has_alpha, has_range):
    low, high = min(summary.lowest), max(summary.highest)
    if has_range and high - low < NARROW:
        yield f"all values are in {low}..{high} of 256 levels: narrow config.data.range"
    elif high <= UNSCALED:
        yield f"no value is above {high}, of 255: if the values were in [0, 1], multiply them by 255 in the files"
    elif high - low < NARROW:
        yield f"all values are in {low}..{high}, of 0..255: stretch them in the files"
    if summary.is_grey:
        yield "the three channels are equal in every pixel: set --config.data.channels=1"
    elif low < high:
        yield from _about_channels(summary, has_alpha, has_range)


def _about_channels(summary, has_alpha, has_range):
    span = max(summary.highest) - min(summary.lowest)
    for i, (low, high) in enumerate(zip(summary.lowest, summary.highest, strict=True)):
        if has_alpha and i == 3 and low == high == 255:
            yield "alpha is 255 in every pixel: set --config.data.channels=3"
        elif low == high:
            yield f"channel {i}, counted from 0, is {low} in every pixel: leave it out of the files"
        elif has_range and high - low < NARROW <= span:  # else `_about_values` has said so
            yield f"channel {i}, counted from 0, is in {low}..{high} of 256 levels: scale it in the file"


def _about_images(summary):
    num, copies, constant = summary.num, summary.copies, summary.nearly_constant
    if num > 1 and copies == num - 1:
        yield f"all {num:,} images are identical: check the files"
    elif copies >= COPIES_SHARE * num:
        yield f"{copies:,} of {num:,} images ({copies / num:.1%}) are exact copies of others: remove the copies"
    varies = max(summary.highest) - min(summary.lowest) > NEARLY_CONSTANT  # else `_about_values` has said so
    if varies and constant >= CONSTANT_SHARE * num:
        yield (
            f"{constant:,} of {num:,} images have nearly one colour only (each channel varies by at most "
            f"{NEARLY_CONSTANT} levels): remove them, or check the crop (config.data.crop)"
        )
    if num < FEW:
        yield f"very few images ({num}), which the network learns by heart: add images"


def _about_classes(counts):
    rare = [name for name, count in counts.items() if count <= 1]
    if rare:
        names = ", ".join(rare[:5]) + ", …" * (len(rare) > 5)
        yield f"classes with one image or none: {len(rare):,} ({names}): add images, or remove or merge these classes"


def spread(num: int, labels: np.ndarray | None, size: int, seed: int = 0) -> np.ndarray:
    """Draws images that are spread over the data set or, with classes, as evenly as can be over the classes.

    Args:
      num: images of the data set.
      labels: int [num], or None without classes.
      size: images to draw; fewer are drawn if there are fewer.

    Returns:
      int [min(size, num)], different indices below `num`, in order of the classes.
    """
    rng = np.random.default_rng(seed)
    if labels is None:
        return np.array([rng.choice(part) for part in np.array_split(np.arange(num), min(size, num))])
    present = np.unique(labels)
    if len(present) > size:
        present = present[np.linspace(0, len(present) - 1, size).astype(int)]
    members = [rng.permutation(np.flatnonzero(labels == label))[:size] for label in present]
    turns = np.concatenate([np.arange(len(indices)) for indices in members])  # the classes take turns
    chosen = np.concatenate(members)[np.argsort(turns, kind="stable")[:size]]
    return chosen[np.lexsort((chosen, labels[chosen]))]
