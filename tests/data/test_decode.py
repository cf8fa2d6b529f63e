import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusion_jax.data import decode

RED = Image.new("RGB", (4, 4), (200, 60, 60))


def saved(image, kind, **options):
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # saving leaves options of the format in an image
    return file


def tiff(bits, sample_format, data, num, white=1):
    """Returns a TIFF of one grey row; sample_format is 1 (unsigned), 2 (signed) or 3 (float)."""
    tags = [(256, num), (257, 1), (258, bits), (259, 1), (262, white), (273, 8), (277, 1), (278, 1), (279, len(data))]
    tags = [*tags, (339, sample_format)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data += b"\0" * (len(data) % 2)
    return io.BytesIO(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4))


def png(width, depth, kind, row, transparent):
    """Returns a PNG of one row with a transparent colour; kind is 0 (grey) or 2 (RGB)."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", transparent) + body)


def test_modes_and_orientations():
    """Lays alpha on white, and applies the palette and the EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it a quarter clockwise
    wide = Image.fromarray(np.uint8([[0, 0], [255, 255]]))
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    for file, expected in (
        (saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"), np.full((4, 4, 3), 255)),
        (saved(Image.new("RGBA", (4, 4), (255, 0, 0, 102)), "PNG"), np.full((4, 4, 3), [255, 153, 153])),
        (saved(Image.new("LA", (4, 4), (0, 102)), "PNG"), np.full((4, 4, 1), 153)),
        (saved(palette, "PNG"), np.full((4, 4, 3), [10, 200, 30])),
        (saved(wide, "PNG", exif=exif), np.uint8([[[255], [0]]] * 2)),
        (saved(Image.new("1", (4, 4), 1), "PNG"), np.full((4, 4, 1), 255)),
        (saved(RED, "PNG", exif=b"Exif\0\0garbage"), np.asarray(RED)),
    ):
        np.testing.assert_array_equal(decode.decode(file)[0], expected)
    black, _ = decode.decode(saved(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "JPEG"))
    assert black.shape == (4, 4, 3) and black.max() < 10


def test_alpha_is_kept_where_it_is_asked_for():
    """With the colours that are below it; pictures without alpha are as ever."""
    half = Image.new("RGBA", (4, 4), (255, 10, 0, 102))
    palette = half.convert("P", palette=Image.Palette.ADAPTIVE)
    for file, expected in (
        (saved(half, "PNG"), [255, 10, 0, 102]),
        (saved(Image.new("RGBA", (4, 4), (255, 10, 0, 0)), "PNG"), [255, 10, 0, 0]),
        (saved(Image.new("LA", (4, 4), (7, 102)), "PNG"), [7, 7, 7, 102]),
        (saved(palette, "PNG", transparency=palette.getpixel((0, 0))), [255, 10, 0, 0]),
        (png(4, 8, 0, bytes([9] * 4), b"\0\x09"), [9, 9, 9, 0]),
        (saved(RED, "PNG"), [200, 60, 60]),
        (saved(Image.new("L", (4, 4), 7), "PNG"), [7]),
    ):
        x = decode.decode(file, alpha=True)[0]
        np.testing.assert_array_equal(x, np.broadcast_to(np.uint8(expected), (*x.shape[:2], len(expected))))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_round_to_the_nearest_level(kind):
    deep = np.uint16([[0, 128, 129, 257 * 77 + 128, 257 * 77 + 129, 32767, 32768, 65535]] * 2)
    image, _ = decode.decode(saved(Image.fromarray(deep), kind))
    np.testing.assert_array_equal(image[0, :, 0], [0, 0, 1, 77, 78, 127, 128, 255])


def test_depths_between_8_and_32_bits():
    for file, expected in (
        (io.BytesIO(b"P2\n3 1\n1000\n0 500 1000\n"), [0, 128, 255]),
        (io.BytesIO(b"P5\n2 1\n4095\n\x08\x00\x0f\xff"), [128, 255]),
        (io.BytesIO(b"P6\n1 1\n65535\n\x80\x00\xff\xff\x00\x00"), [128, 255, 0]),
        (tiff(12, 1, bytes([0x80, 0x0F, 0xFF]), 2), [128, 255]),
        (tiff(16, 1, struct.pack("<3H", 0, 16384, 65535), 3, white=0), [255, 191, 0]),
        (tiff(32, 3, struct.pack("<3f", 0, 0.25, 1), 3), [0, 64, 255]),
        (saved(Image.fromarray(np.float32([[0, 0.25, 1]])), "PPM"), [0, 64, 255]),
    ):
        np.testing.assert_array_equal(decode.decode(file)[0].ravel(), expected)


@pytest.mark.parametrize(
    "bits, sample_format, values",
    [
        (8, 2, np.int8([0, 1, 2])),
        (16, 2, np.int16([-5, 0, 300])),
        (32, 2, np.int32([0, 255, 70000])),
        (32, 1, np.uint32([0, 2**31, 2**32 - 1])),
        (32, 3, np.float32([0, 128, 255])),
        (32, 3, np.float32([-0.1, 0, 1])),
        (32, 3, np.float32([0, np.nan, 1])),
        (64, 3, np.float64([0, 0.5, 1])),
    ],
)
def test_pixels_without_a_fixed_white_are_refused(bits, sample_format, values):
    with pytest.raises(ValueError, match=r"save it with 8 or 16 bits|of a kind that Pillow reads"):
        decode.decode(tiff(bits, sample_format, values.tobytes(), 3))


def test_transparent_colour_at_any_depth():
    for file, expected in (
        (png(2, 1, 0, bytes([0b10000000]), struct.pack(">H", 0)), [255, 255]),
        (png(2, 2, 0, bytes([0b01100000]), struct.pack(">H", 1)), [255, 170]),
        (png(2, 4, 0, bytes([0x3C]), struct.pack(">H", 3)), [255, 204]),
        (png(2, 16, 0, struct.pack(">2H", 1000, 1001), struct.pack(">H", 1000)), [255, 4]),
        (
            png(2, 16, 2, struct.pack(">6H", 1000, 0, 0, 60000, 0, 0), struct.pack(">3H", 1000, 0, 0)),
            [255] * 3 + [234, 0, 0],
        ),
    ):
        np.testing.assert_array_equal(decode.decode(file)[0].ravel(), expected)


def display_p3():
    """Returns an ICC profile: that of sRGB, with the primaries of Display P3."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.515102, 0.241182, -0.001050),
        b"gXYZ": (0.291965, 0.692236, 0.041882),
        b"bXYZ": (0.157153, 0.066581, 0.784378),
    }
    for k in range(struct.unpack_from(">I", profile, 128)[0]):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * k)
        if tag in primaries:
            struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in primaries[tag]))
    return bytes(profile)


def test_icc_profile_is_converted_to_srgb():
    translucent = RED.convert("RGBA")
    translucent.putalpha(102)
    palette = RED.convert("P", palette=Image.Palette.ADAPTIVE)
    for image, expected in ((RED, [217, 42, 52]), (palette, [217, 42, 52]), (translucent, [240, 170, 174])):
        np.testing.assert_array_equal(decode.decode(saved(image, "PNG", icc_profile=display_p3()))[0][0, 0], expected)


def test_profiles_that_do_not_apply_leave_the_pixels():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image, profile in ((RED, srgb), (RED, b"garbage" * 30), (RED, display_p3()[:300]), (RED.convert("L"), srgb)):
        pixels, _ = decode.decode(saved(image, "PNG", icc_profile=profile))
        np.testing.assert_array_equal(pixels, np.asarray(image).reshape(pixels.shape))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_first_of_several_frames(kind):
    black = Image.new("RGB", (4, 4))
    assert not decode.decode(saved(black, kind))[1]
    first, has_more = decode.decode(saved(black, kind, save_all=True, append_images=[RED.copy()]))
    assert has_more and first.max() < 10


def test_formats_that_start_programs_are_refused():
    with pytest.raises(ValueError, match=r"neither AVIF, BMP, .* nor WEBP"):
        decode.decode(saved(RED, "EPS"))
    assert {".jfif", ".jp2", ".avif", ".png"} <= decode.SUFFIXES and ".eps" not in decode.SUFFIXES


def test_decompression_bomb_is_refused():
    with pytest.raises(ValueError, match="8000x8000 is more than the limit of 50000000 pixels"):
        decode.decode(saved(Image.new("1", (8000, 8000)), "PNG"))
