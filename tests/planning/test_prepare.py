import re

import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from PIL import Image

from diffusion_jax import parts
from diffusion_jax.errors import UserError
from diffusion_jax.pictures import grids
from diffusion_jax.planning import prepare

PICTURES = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), np.uint8)


@pytest.fixture
def printed(tmp_path, capsys):
    """printed(**overrides) -> the lines that the preparation of configs/tiny.py prints; the grid is tmp_path/x.png."""

    def run(**overrides):
        settings = {"data__cache_dir": str(tmp_path / "cache")} | overrides
        prepare.prepare(tiny_config(**settings), str(tmp_path / "x.png"))
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def folder(tmp_path):
    """Folders of pictures: 70 cats, 49 dogs and an owl."""
    names = ["cat"] * 70 + ["dog"] * 49 + ["owl"]
    for i, (name, pixels) in enumerate(zip(names, PICTURES, strict=True)):
        (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "animals" / name / f"{i:03}.png")
    return tmp_path / "animals"


def test_the_digits_are_described(printed, tmp_path):
    first, cache, *rest = printed()
    assert re.fullmatch(r"1,797 images, 8x8x1, ready in \d+\.\d s", first)
    (place,) = (tmp_path / "cache").iterdir()
    assert cache == f"cache: {place}; unreadable images skipped: 0"
    assert rest == [
        "over all 1,797 images:",
        "  values of each channel: 0..255 (mean 77.9)",
        "  10 classes: 0 (178), 1 (182), 2 (177), 3 (183), 4 (181), 5 (182), 6 (181), 7 (179), 8 (174), 9 (180)",
        f"16 of the images: {tmp_path / 'x.png'}",
    ]


def test_the_grid_shows_16_images_of_all_classes(printed, tmp_path):
    printed()
    shown = np.asarray(Image.open(tmp_path / "x.png"))
    config = tiny_config(data__cache_dir=str(tmp_path / "cache"))
    images = parts.images(config)
    of_one = grids.grid(images[:16])
    assert shown.shape == of_one.shape[:2]
    tiles = {grids.grid(images[i : i + 1])[4:-4, 4:-4].tobytes(): i for i in range(len(images))}
    rows, columns = (np.split(np.arange(4, shown.shape[axis]), 4) for axis in (0, 1))
    found = [tiles[shown[np.ix_(row[:64], column[:64])].tobytes()] for row in rows for column in columns]
    assert len(set(found)) == 16
    assert set(images.labels[found]) == set(range(10))


def test_own_images_in_colour_with_warnings_and_a_damaged_one(printed, folder, tmp_path):
    (folder / "cat" / "cut.png").write_bytes((folder / "cat" / "000.png").read_bytes()[:60])
    lines = printed(data__path=str(folder), data__channels=3, data__skip_corrupt=True)
    assert any(line.endswith("unreadable images skipped: 1") for line in lines)
    values = ", ".join(f"0..255 (mean {mean:.1f})" for mean in PICTURES.mean((0, 1, 2)))
    assert lines[-5:] == [
        "over all 120 images:",
        f"  values of each channel: {values}",
        "  3 classes: cat (70), dog (49), owl (1)",
        "warning: classes with one image or none: 1 (owl): add images, or remove or merge these classes",
        f"16 of the images: {tmp_path / 'x.png'}",
    ]


def test_alpha_that_is_opaque_everywhere_is_named_and_the_channel_of_an_array_is_not_alpha(printed, folder, tmp_path):
    settings = {"data__channels": 4, "data__path": str(folder)}
    assert "warning: alpha is 255 in every pixel: set --config.data.channels=3" in printed(**settings)
    array = np.concatenate([PICTURES, np.full_like(PICTURES[..., :1], 255)], axis=-1)
    np.save(tmp_path / "array.npy", array)
    lines = printed(data__path=str(tmp_path / "array.npy"), data__channels=4)
    assert "warning: channel 3, counted from 0, is 255 in every pixel: leave it out of the files" in lines
    lines = printed(data__path=str(tmp_path / "array.npy"), data__channels=4, data__range=(0.0, 10_000.0))
    assert "warning: all values are in 0..7 of 256 levels: narrow config.data.range" in lines


def test_images_without_classes(printed, folder):
    assert "  classes: none" in printed(data__path=str(folder / "cat"))


def test_of_many_classes_the_extremes_are_named(printed, tmp_path):
    for i in range(44):
        name = min(i, 20)
        (tmp_path / "many" / f"c{name}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(PICTURES[i]).save(tmp_path / "many" / f"c{name}" / f"{i}.png")
    lines = printed(data__path=str(tmp_path / "many"))
    assert "  21 classes, from c0 (1) to c20 (24)" in lines
    assert "warning: very few images (44), which the network learns by heart: add images" in lines


def test_images_decoded_on_the_fly_are_looked_at_in_part(printed, folder, monkeypatch):
    monkeypatch.setattr(prepare, "SUBSET", 110)
    settings = {"data__path": str(folder), "data__channels": 3, "data__cache_limit_gb": 0.0}
    lines = printed(**settings)
    assert "no cache; unreadable images are not counted, because images are decoded on the fly" in lines
    assert "over 110 of the images, drawn at random:" in lines
    cats, dogs, owls = map(int, re.search(r"cat \((\d+)\), dog \((\d+)\), owl \((\d)\)", "\n".join(lines)).groups())
    assert cats + dogs + owls == 110 and 60 <= cats <= 70
    assert not any(line.startswith("warning") for line in lines)  # a part cannot tell how large a class is
    assert [line for line in printed(**settings) if "ready in" not in line] == [
        line for line in lines if "ready in" not in line
    ]


def test_images_decoded_on_the_fly_are_all_looked_at_if_they_are_few(printed, folder):
    settings = {"data__path": str(folder), "data__channels": 3}
    cached, decoded = printed(**settings), printed(**settings, data__cache_limit_gb=0.0)
    assert cached[-5:] == decoded[-5:]


def test_reading_in_blocks_changes_nothing(printed, monkeypatch):
    whole = printed()
    sizes = []
    monkeypatch.setattr(prepare, "BLOCK", 64 * 100)
    examples = prepare.Cached.examples
    monkeypatch.setattr(prepare.Cached, "examples", lambda *args: sizes.append(len(args[1])) or examples(*args))
    assert printed()[1:] == whole[1:]
    assert sizes == [100] * 17 + [97, 16]  # the last are drawn


@pytest.mark.parametrize(
    "out, message",
    [
        ("x.jpg", r"--out=.*x\.jpg must end in \.png"),
        ("folder.png", r"--out=.*folder\.png is a folder: give a file in it"),
        ("file/x.png", r"--out=.*file/x\.png cannot be written"),
    ],
)
def test_unusable_out_is_refused_before_the_images_are_read(tmp_path, monkeypatch, out, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("a file, not a folder")
    monkeypatch.setattr(parts, "images", None)
    with pytest.raises(UserError, match=message):
        prepare.prepare(tiny_config(), f"{tmp_path}/{out}")


def test_the_folder_of_out_is_made(tmp_path):
    prepare.prepare(tiny_config(data__cache_dir=str(tmp_path / "cache")), str(tmp_path / "new" / "x.png"))
    assert grids.is_readable(epath.Path(tmp_path / "new" / "x.png"))
