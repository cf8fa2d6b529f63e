import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import sources
from diffusion_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Writes five images."""
    for i in range(5):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_digits():
    digits = sources.open_source("digits", "")
    assert len(digits) == 1797
    assert digits[0].shape == (8, 8, 1) and digits[0].dtype == np.uint8
    values = set(np.unique([digits[i] for i in range(100)]))
    assert values == {round(i * 255 / 16) for i in range(17)}
    assert [digits.label(i) for i in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_the_source_may_be_the_path_itself(folder):
    assert len(sources.open_source(str(folder), "")) == 5


def test_path_takes_precedence_over_the_source(folder):
    for source in ("digits", "tfds:celeb_a", "files"):
        assert len(sources.open_source(source, str(folder))) == 5


def test_one_folder_has_one_source_however_its_path_is_spelled(folder, monkeypatch):
    (folder / "link").symlink_to(".")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    name = folder.name
    spellings = [str(folder), f"{folder}/", name, f"./{name}/", f"~/{name}", f"{name}/../{name}", f"{name}/link"]
    sources_ = [sources.open_source("files", spelling) for spelling in spellings]
    assert {(source.origin, source.version) for source in sources_} == {(str(folder), sources_[0].version)}


def test_paths_that_cannot_be_looked_up_do_not_exist():
    for path in ("~nobody_of_this_name/faces", "x" * 5000):
        with pytest.raises(UserError, match="does not exist"):
            sources.open_source("files", path)


def test_part_of_a_split():
    whole = sources.open_source("digits", "")
    for split, first, last in (
        ("train[:1500]", 0, 1499),
        ("train[1500:]", 1500, 1796),
        ("train[-3:]", 1794, 1796),
        ("train[50%:]", 898, 1796),
    ):
        part = sources.open_source("digits", "", split=split)
        assert len(part) == last - first + 1
        assert part.version != whole.version
        for i, k in ((0, first), (-1, last)):
            i %= len(part)
            np.testing.assert_array_equal(part[i], whole[k])
            assert (part.label(i), part.name(i)) == (whole.label(k), whole.name(k))
    with pytest.raises(UserError, match=r"\[5:3\] of 1797 images is empty"):
        sources.open_source("digits", "", split="train[5:3]")
    with pytest.raises(UserError, match=r"split='train\[5\]' must be a name, or a part of a split"):
        sources.open_source("digits", "", split="train[5]")
    with pytest.raises(UserError, match="split='test': the digits"):
        sources.open_source("digits", "", split="test")


def test_errors_name_the_key(tmp_path):
    with pytest.raises(UserError, match="path is empty"):
        sources.open_source("files", "")
    with pytest.raises(UserError, match="does not exist"):
        sources.open_source("files", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="source='dogs' must be"):
        sources.open_source("dogs", "")
