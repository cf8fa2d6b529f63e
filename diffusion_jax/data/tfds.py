"""Images from TensorFlow Datasets (TFDS)."""

import functools
import importlib.util
import os

import numpy as np
from PIL import Image  # noqa: TID251 (converts images of other types)

from diffusion_jax.data.decode import pixels
from diffusion_jax.data.source import Source
from diffusion_jax.errors import UserError, one_line


def tfds(name: str, *, data_dir: str = "", manual_dir: str = "", split: str = "train", alpha: bool = False) -> Source:
    """Returns a TFDS data set, stored as array_record.

    Reading a prepared data set does not need TensorFlow. An unprepared one is prepared here, which does.

    Args:
      name: e.g. "celeb_a" or "lsun/church_outdoor".
      data_dir: the folder of TFDS's data sets; "" is ~/tensorflow_datasets.
      manual_dir: a folder of files that TFDS uses instead of downloading them, under the names that it expects.
      split: in the notation of TFDS, e.g. "train", "test", "train+validation" or "train[:90%]".
      alpha: True keeps the alpha of pictures, see `decode.pixels`.

    Raises:
      UserError: the data set or the split does not exist, has no images, or cannot be prepared.
    """
    import tensorflow_datasets  # noqa: TID251 (half a second, and no other source needs it)

    try:
        builder = tensorflow_datasets.builder(name, data_dir=_folder_or_none(data_dir), file_format="array_record")
    except Exception as error:  # many types; the message goes on to list all data sets
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"config.data.source='tfds:{name}' is not a TFDS data set ({line}): see tensorflow.org/datasets"
        ) from None
    features = builder.info.features
    image_keys = [key for key in features if isinstance(features[key], tensorflow_datasets.features.Image)]
    if not image_keys:
        raise UserError(
            f"config.data.source='tfds:{name}' has no images, only {', '.join(features)}: choose another data set"
        )
    examples = _examples(builder, name, split, manual_dir)

    # The same thread reads the label right after the image, so the cache saves a second decoding.
    element = functools.lru_cache(maxsize=2 * (os.cpu_count() or 1))(examples.__getitem__)
    has_classes = isinstance(dict(features).get("label"), tensorflow_datasets.features.ClassLabel)
    return Source(
        f"tfds:{builder.info.full_name}/{split}",
        f"{builder.info.full_name}/{split}/{len(examples)}",
        len(examples),
        lambda i: f"tfds:{name}/{split}[{i}]",
        lambda i: _from_array(element(i)[image_keys[0]], alpha),
        (lambda i: int(element(i)["label"])) if has_classes else None,
        features["label"].names if has_classes else (),
    )


def _from_array(image, alpha):
    """Returns uint8 [H, W, 1 or 3] unchanged, and converts any other image by `pixels`."""
    if image.dtype == np.uint8 and image.shape[-1] in (1, 3):
        return image
    return pixels(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), alpha)


def _examples(builder, name, split, manual_dir):
    """Returns TFDS's random-access source of the split; prepares the data set if necessary."""
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        raise UserError(
            f"config.data.source='tfds:{name}': {builder.data_path} is stored as {builder.info.file_format.value}, "
            "which has no random access: prepare it as array_record in another folder (config.data.path)"
        ) from None
    except Exception as error:  # KeyError, ValueError or AttributeError, depending on the version of TFDS
        if builder.is_prepared():
            splits = ", ".join(builder.info.splits)
            raise UserError(
                f"config.data.split={split!r} is not a split of tfds:{name} ({error}): give one of {splits}"
            ) from None
    _prepare(builder, name, manual_dir)
    return builder.as_data_source(split)


def _prepare(builder, name, manual_dir):
    """Downloads and prepares the data set. Raises UserError if TensorFlow is missing, or a step fails."""
    own_files = "give the images as a folder or a zip, --config.data.path=…"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"config.data.source='tfds:{name}' is not prepared in {builder.data_path}, and TensorFlow, "
            "which prepares it, is missing: pip install -r requirements-prepare.txt (best in another environment), or "
            f"{own_files}"
        )
    from tensorflow_datasets import download  # noqa: TID251 (the import is slow)

    print(f"preparing tfds:{name} in {builder.data_path}")
    config = download.DownloadConfig(manual_dir=_folder_or_none(manual_dir))
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:  # no network, a quota of Google Drive, a wrong checksum, files to download by hand, …
        reason = one_line(error, 300)
        raise UserError(
            f"config.data.source='tfds:{name}' cannot be prepared ({type(error).__name__}: {reason}): put the files "
            f"into a folder and give it, --config.data.manual_dir=… (now {manual_dir!r}), or {own_files}"
        ) from None


def _folder_or_none(path):
    """Returns the absolute path, or None for ""."""
    return os.path.abspath(os.path.expanduser(path)) if path else None
