"""What each number of an evaluation is, which values are good, and why a number is missing."""

from typing import Any

_FLOOR = "lower is better, and frechet_floor is what real images reach"
MEANINGS = {
    "bits_per_dim": "bits for each value of a pixel that a lossless code of the images needs at most; lower is better, "
    "and less than png_bits_per_dim is good; Ho et al. report 3.75 for CIFAR-10",
    "standard_error": "of the number beside it: another choice of images would differ by about that much",
    "prior": "the part of bits_per_dim from x_T; about 0 for a schedule that ends in noise",
    "decoder": "the part of bits_per_dim from the last step, t = 1",
    "rate": "bits_per_dim without the decoder: what the steps t > 1 cost",
    "distortion": "root mean square error of the image before the decoder, in grey levels of 255; lower is better, "
    "below 1 cannot be seen",
    "histogram_bits_per_dim": "the same bits with a code that knows only how often each level occurs at a pixel: "
    "a model should need fewer",
    "png_bits_per_dim": "the same bits as PNG files: a model should need fewer",
    "loss": "mean squared error of the predicted noise, (15); 1 is an untrained network, less is better, and it "
    "compares runs of the same data and schedule alone",
    "n": "images that were measured",
    "of": "images of the split",
    "loss_by_t": "The loss at each step t: near 1 at small t, where the noise is small, and near 0 at large t.",
    "rate_distortion": "Progressive coding: the bits that transmit x_t, and the error of the image predicted from it.",
    "frechet": f"Fréchet distance of Gaussians fit to the features of samples and images; {_FLOOR}; compares with "
    "numbers of the same features and the same number of samples alone",
    "frechet_standard_error": "how much another set of samples of this size would change frechet, about",
    "frechet_extrapolated": "[value, error] of frechet for infinitely many samples; compares between runs",
    "frechet_floor": "[mean, spread] of frechet between real images and other real images, with as many of them as "
    "there are samples, or half of the images",
    "frechet_at_floor_size": "[mean, spread] of frechet for samples in the place of those real images: a perfect model "
    "reaches frechet_floor",
    "kernel_distance": "[mean, error] of KID, the kernel distance; its mean is 0 for a perfect model at any number of "
    "samples",
    "precision": "share of the samples that look like images of the data; 1 is best, low means artefacts",
    "recall": "share of the data that the samples come close to; 1 is best, low means missing kinds of images; says "
    "nothing while precision is near 0, as noise comes close to everything",
    "density": "how densely real images surround the samples; about 1 for a perfect model",
    "coverage": "share of the images that have a sample nearby; 1 is best",
    "neighbours_among": "images and samples that these four were measured with; few of them lower coverage and recall",
    "sliced_wasserstein": "distance along random directions, in units of the features; 0 is best",
    "nearest_training_image": "Distance of each sample to its nearest training image: far less than that of held-out "
    "images means copies.",
    "median": "median distance of a sample to its nearest training image",
    "least": "the least such distance; 0 is a copy",
    "median_of_held_out": "the same median for held-out images: a model that does not copy has about as much",
    "classifiers": "How often a classifier of real images sees the class that a sample was asked for.",
    "accuracy": "of the samples: as high as held_out_accuracy is good, higher means too typical samples",
    "held_out_accuracy": "of held-out real images",
    "frechet_within_classes": "[mean over the classes, error] of frechet to the images of the same class",
}
_NOT_WEIGHTS = "none: pixels have no weights"
_CLOSE = 2  # spreads above the floor that another set of real images reaches too
_COPIES = 0.7  # share of the distance of held-out images below which samples may be copies
_REASONS = {
    "standard_error": "needs at least 2 images",
    "frechet_extrapolated": "needs at least 10 samples for each feature",
    "eta": "not used by this sampler",
    "sigma": "not used by this sampler",
    "density": "not measured",
}


def meaning(key: str, value: Any = None) -> str:
    """Returns what the number under `key` is, or "" if that is not known; a density may also be a name, p(x | y)."""
    if key == "density" and isinstance(value, str):
        return "what the bound is of: x, x given its class y, or x given no class"
    return MEANINGS.get(key, "")


def verdicts(result: dict[str, Any]) -> list[str]:
    """Returns what the numbers of an evaluation say of the run, a sentence each; [] for numbers that are not there."""
    texts = []
    for split, values in result.get("splits", {}).items():
        bits, png = values.get("bits_per_dim"), values.get("png_bits_per_dim")
        if bits is not None and png is not None:
            fewer = "fewer, as a good model does" if bits < png else "no fewer: train for longer or a larger network"
            texts.append(f"{split}: {bits:.2f} bits/dim, where PNG files take {png:.2f}; {fewer}.")
    samples = result.get("samples") or {}
    if floor := samples.get("frechet_floor"):
        distance = samples["frechet_at_floor_size"][0]
        is_close = distance <= floor[0] + _CLOSE * floor[1]
        texts.append(
            f"samples: Fréchet distance {distance:.4g}, where as many real images have "
            f"{floor[0]:.4g} ± {floor[1]:.2g}; "
            + ("as near to the data as real images." if is_close else f"{distance / floor[0]:.1f} times as far.")
        )
    nearest = samples.get("nearest_training_image") or {}
    if held_out := nearest.get("median_of_held_out"):
        share = nearest["median"] / held_out
        copies = "look at nearest.png: these may be copies." if share < _COPIES else "no sign of copies."
        texts.append(f"samples: {share:.0%} of the distance of held-out images from the training images; {copies}")
    return texts


def with_reasons(values: Any, settings: Any = None) -> Any:
    """Returns a copy of evaluation.json, of any content, where "none: …" with the reason replaces each null."""
    if not isinstance(values, dict):
        return values
    protocol = values.get("protocol")
    settings = protocol.get("metrics") if isinstance(protocol, dict) else settings
    missing = {key: _reason(key, settings) for key, x in values.items() if x is None}
    missing |= {key: _NOT_WEIGHTS for key, x in values.items() if key == "checksum" and x == ""}
    return {key: missing.get(key) or with_reasons(x, settings) for key, x in values.items()}


def _reason(key, settings):
    own = settings.get(key) if isinstance(settings, dict) else None
    why = own.get("left_out") if isinstance(own, dict) else None
    return f"none: {why or _REASONS.get(key, 'it was not measured')}"
