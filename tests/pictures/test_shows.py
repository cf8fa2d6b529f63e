"""The pictures of `--show` have the sizes and the contents that they state."""

import itertools

import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from diffusion_jax import train
from diffusion_jax.data import pixels
from diffusion_jax.errors import UserError
from diffusion_jax.pictures import edits, grids, shows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_network")]

TILE = 64 + 4


@pytest.fixture(scope="module")
def run(small_network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train.train(tiny_config(train__num_steps=1), str(workdir))
    return workdir


SIZES = {"interpolation": (13, 4), "progressive": (11, 4), "variations": (5, 4), "inpainting": (7, 4)}
SIZES["reconstruction"] = (5, 4)  # 10 steps, and all 20


@pytest.mark.parametrize("name, size", SIZES.items(), ids=SIZES)
def test_pictures_have_labelled_rows_and_depend_on_the_seed(run, tmp_path, capsys, name, size):
    out = tmp_path / "new" / f"{name}.png"
    shows.show(run, name, seed=0, out=str(out), num=4)
    assert f"{name} of step 1: {out}" in capsys.readouterr().out
    with Image.open(out) as picture:
        columns, rows = size
        width, height = columns * TILE + 4, rows * TILE + 4
        assert picture.height == height + 2 * grids.LABEL
        assert width < picture.width < width + 150
        first = np.asarray(picture)
    shows.show(run, name, seed=0, out=str(out), num=4)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), first)
    shows.show(run, name, seed=1, out=str(out), num=4)
    assert (np.asarray(Image.open(out)) != first).any()


def test_progressive_ends_with_the_samples(run, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(shows, "_save", lambda _, out, rows, *labels: saved.append((rows, *labels)))
    shows.show(run, "progressive", seed=0, out=str(tmp_path / "x.png"), num=4)
    (rows, _, columns), parts = saved[0], shows._Run(run, 0, "")
    assert columns[0] == "t = 20" and columns[-1] == "t = 0"
    keys = parts.keys(4)
    samples = parts.compiled(shows.sampling.reverse_chain)(parts.latents(keys), keys)
    np.testing.assert_array_equal(rows[:, -1], samples)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animation_ends_with_the_samples(run, tmp_path, ending):
    out = tmp_path / f"chain.{ending}"
    shows.show(run, "animation", seed=0, out=str(out), num=4)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(0), 0), np.arange(4))
    with Image.open(out) as animation:
        assert animation.n_frames in ({21} if ending == "gif" else {20, 21})  # WebP joins frames that look alike
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("L")).astype(int)
    chain = shows._Run(run, 0, "").compiled(shows.sampling.reverse_chain)
    samples = pixels.to_uint8(chain(shows._Run(run, 0, "").latents(keys), keys))
    tolerance = 0 if ending == "gif" else 30  # WebP loses a little
    assert abs(last - grids.grid(samples)[..., 0]).max() <= tolerance


def test_images_of_another_folder_have_the_size_of_the_runs(run, tmp_path):
    (tmp_path / "own").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 30), "white").save(tmp_path / "own" / f"{i}.png")
    own = shows._Run(run, 0, str(tmp_path / "own"))
    own._config.data.cache_dir = str(tmp_path / "cache")
    np.testing.assert_array_equal(own.images(2), np.ones((2, 8, 8, 1)))
    with pytest.raises(UserError, match="the picture needs 3 images, but the data set has 2"):
        own.images(3)


def test_inpainting_prints_the_boundary_errors_of_its_columns(run, tmp_path, monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(shows, "_save", lambda _, out, rows, *labels: saved.append((rows, *labels)))
    shows.show(run, "inpainting", seed=0, out=str(tmp_path / "x.png"), num=2)
    (rows, _, columns), inside = saved[0], np.zeros((2, 8, 8, 1), bool)
    assert columns == ["image", "known", "chain 1", "chain 2", "RePaint 1", "RePaint 2", "RePaint 3"]
    inside[0, 4:] = inside[1, 2:6, 2:6] = True
    np.testing.assert_array_equal(
        np.where(inside[:, None], 0, rows), np.where(inside, 0, rows[:, 0])[:, None] + 0 * rows
    )
    assert all(np.ptp(rows[:, [i, j]], axis=1).max() > 0.1 for i, j in itertools.combinations(range(2, 7), 2))
    errors = np.stack([edits.boundary_error(rows[:, i], inside) for i in range(7)])
    texts = []
    for kind, x in {"image": errors[0], "chain": errors[2:4].mean(0), "RePaint": errors[4:].mean(0)}.items():
        texts.append(f"{kind} {x.mean():.3f} ± {abs(x[0] - x[1]) / 8**0.5:.3f}")
    assert f"boundary error of 2 images (white is 1, black is -1): {', '.join(texts)}\n" in capsys.readouterr().out


def test_variations_of_pictures_are_sdedit(run, tmp_path, monkeypatch):
    """Rows start with a picture of the folder; there is one for each picture and t."""
    saved = []
    monkeypatch.setattr(shows, "_save", lambda _, out, rows, *labels: saved.append((rows, *labels)))
    monkeypatch.setattr(
        shows._Run,
        "images",
        lambda self, num, or_fewer: np.float32([1, -1]).reshape(2, 1, 1, 1) + np.zeros((1, *self.shape), np.float32),
    )
    shows.show(run, "variations", seed=0, out=str(tmp_path / "x.png"), num=3, path="folder")
    rows, steps, columns = saved[0]
    rows = np.stack([np.stack(row) for row in rows])
    assert steps == ["t = 10", "t = 7", "t = 3"] * 2 and columns == ["image", "1", "2", "3"]
    np.testing.assert_array_equal(rows[:3, 0], 1), np.testing.assert_array_equal(rows[3:, 0], -1)
    parts = shows._Run(run, 0, "folder")
    keys, x_0 = parts.keys(3, stream=1), np.ones((3, *parts.shape), np.float32)
    np.testing.assert_allclose(rows[0, 1:], parts.compiled(edits.sdedit, t=10)(x_0, keys), atol=1e-5)


def test_a_folder_of_one_picture_is_enough_for_variations(run, tmp_path):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (8, 8), "white").save(tmp_path / "own" / "0.png")
    own = shows._Run(run, 0, str(tmp_path / "own"))
    own._config.data.cache_dir = str(tmp_path / "cache")
    np.testing.assert_array_equal(own.images(2, or_fewer=True), np.ones((1, 8, 8, 1)))


def test_reconstruction_prints_the_errors_of_its_columns(run, tmp_path, monkeypatch, capsys):
    """The network of one step predicts about 0: DDIM divides a latent by ᾱ_T. These latents are wrong by 1/n."""
    saved = []
    monkeypatch.setattr(shows, "_save", lambda _, out, rows, *labels: saved.append((rows, *labels)))
    monkeypatch.setattr(shows.edits, "invert", lambda _, s, ts, x: s.alpha_bar[-1] * (x + 1 / (len(ts) - 1)))
    shows.show(run, "reconstruction", seed=0, out=str(tmp_path / "x.png"), num=3)
    rows, _, columns = saved[0]
    assert columns == ["image", "latent 10", "10 steps", "latent 20", "20 steps"]
    np.testing.assert_allclose(rows[:, 2] - rows[:, 0], np.full((3, 8, 8, 1), 0.1), atol=1e-4)
    assert ": 10 steps 0.100 ± 0.000, 20 steps 0.050 ± 0.000\n" in capsys.readouterr().out


def test_unusable_arguments_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--out=x\.jpg must end in \.png for --show=variations"):
        shows.show(run, "variations", 0, "x.jpg")
    with pytest.raises(UserError, match=r"must end in \.gif or \.webp for --show=animation"):
        shows.show(run, "animation", 0, "x.png")
    with pytest.raises(UserError, match=r"--num=0 must be an integer in 1\.\.4,294,967,296"):
        shows.show(run, "variations", 0, "x.png", num=0)
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(UserError, match=rf"--seed={seed} must be an integer in 0\.\.4,294,967,295"):
            shows.show(run, "variations", seed, "x.png")
    with pytest.raises(UserError, match="holds no run"):
        shows.show(tmp_path, "variations", 0, "x.png")


def test_labels_stand_beside_their_rows_and_columns():
    sheet = grids.labelled(np.zeros((6, 64, 64, 1), np.uint8), ["a", "b"], ["1", "2", "3"])
    left, top = sheet.shape[1] - (3 * TILE + 4), 2 * grids.LABEL
    assert sheet.shape[0] == 2 * TILE + 4 + top
    dark = sheet[..., 0] < 100
    assert [dark[top + i * TILE : top + (i + 1) * TILE, :left].any() for i in range(2)] == [True, True]
    assert [dark[:top, left + i * TILE : left + (i + 1) * TILE].any() for i in range(3)] == [True] * 3
    assert not dark[:top, :left].any()
    np.testing.assert_array_equal(sheet[top:, left:], grids.grid(np.zeros((6, 64, 64, 1), np.uint8), columns=3))
