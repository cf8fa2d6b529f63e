"""The pixels of image files, as a viewer shows them."""

import contextlib
import functools
import io
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError  # noqa: TID251 (decodes the images)

# Pillow would also open formats that start another program, as EPS starts Ghostscript.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
MAX_PIXELS = 50_000_000  # pixels of the largest image: a PNG of 200 kB can unpack to gigabytes
_SAVE_ANEW = "save it with 8 or 16 bits"


def decode(file: Path | BinaryIO, alpha: bool = False) -> tuple[np.ndarray, bool]:
    """Returns (the `pixels` of the first frame or page of a file, True if the file has more of them).

    Args:
      alpha: see `pixels`.

    Raises:
      ValueError: the file has another format than FORMATS, or see `pixels`.
      Exception: the file is damaged. Pillow raises many types.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"neither {', '.join(FORMATS[:-1])} nor {FORMATS[-1]} of a kind that Pillow reads") from None
    with image:
        first = pixels(image, alpha)
        try:
            return first, getattr(image, "is_animated", False)
        except Exception:  # the first frame is whole, and nothing else is needed
            return first, False


def pixels(image: Image.Image, alpha: bool = False) -> np.ndarray:
    """Returns the pixels that a viewer shows, uint8 [H, W, 1] if the image is grey, else [H, W, 3].

    Applies the orientation of the EXIF data, the palette and the ICC profile, lays transparent parts on white, and
    scales deeper pixels to 8 bits. White is 65535 for 16 bits, and 1 for floats.

    Args:
      alpha: True returns [H, W, 4], red, green, blue and alpha, if the image has transparent parts.

    Raises:
      ValueError: the image has more than MAX_PIXELS, or its pixels have no fixed white.
      Exception: Pillow cannot decode the image, and raises many types.
    """
    if math.prod(image.size) > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than the limit of {MAX_PIXELS} pixels")
    _scale_transparency(image)
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data does not spoil the pixels
        ImageOps.exif_transpose(image, in_place=True)
    image, profile, opacity = _eight_bits(image), image.info.get("icc_profile"), None
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        opacity = image.getchannel("A")
    mode = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if profile and (transform := _to_srgb(profile, mode)):
        image = transform.apply(image)
    mode = "L" if grey else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if opacity and alpha:
        image = image.convert("RGB")
        image.putalpha(opacity)
    elif opacity:
        image = Image.composite(image, Image.new(image.mode, image.size, "white"), opacity)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _scale_transparency(image):
    """Scales the transparent colour of a PNG to 8 bits. Pillow scales only the pixels, and none would match."""
    colour, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format == "PNG" and tiles and colour is not None:
        if tiles[0].args in ("L;2", "L;4"):
            image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[tiles[0].args]
        elif tiles[0].args == "RGB;16B":
            image.info["transparency"] = tuple(level >> 8 for level in colour)


def _eight_bits(image):
    """Returns an image with 8 bits per channel. Scales grey levels of 16 bits and floats, and rounds to nearest."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if (image.mode == "I" and image.format != "PPM") or 2 in tags.get(339, ()):  # tag SampleFormat: 2 is signed
        raise ValueError(f"pixels of 32 bits or with a sign have no fixed white: {_SAVE_ANEW}, unsigned")
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also refuses NaN
            raise ValueError(f"float pixels from {values.min():g} to {values.max():g} are not in 0..1: {_SAVE_ANEW}")
        levels = np.rint(values * 255).astype(np.uint8)
    else:
        white = 2 ** tags.get(258, (16,))[0] - 1  # tag BitsPerSample, which may be 12
        levels = ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(262) == 0:  # tag PhotometricInterpretation: 0 is white. Pillow inverts 8 bits, but no others.
        levels = 255 - levels
    scaled = Image.fromarray(levels)
    if "transparency" in image.info:  # the level that is transparent
        scaled.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return scaled


@functools.lru_cache(maxsize=16)
def _to_srgb(profile, mode):
    """Returns the transform from an ICC profile to sRGB, or None for a broken one, of another mode, or near sRGB.

    Most profiles are near sRGB: leaving these out is faster, and keeps the pixels exact.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    values = np.random.default_rng(0).integers(0, 256, 64 * 64 * len(mode), np.uint8)
    colours = Image.frombytes(mode, (64, 64), values.tobytes())
    changes = np.int16(transform.apply(colours)) - np.int16(colours.convert("RGB"))
    return transform if abs(changes).max() > 2 else None
