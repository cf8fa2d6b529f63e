"""The files of --mode=sample and their protocol."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import write_random_run
from PIL import Image

from diffusion_jax import sample
from diffusion_jax.errors import UserError
from diffusion_jax.interop import samples
from diffusion_jax.interop.samples import write_samples
from diffusion_jax.running import workdir as workdirs

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def workdir(small_network, tmp_path_factory):
    """Writes a run with a random checkpoint."""
    workdir = tmp_path_factory.mktemp("run")
    write_random_run(workdir)
    return workdir


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "SHARD", 3)
    return tmp_path / "shards"


def content(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
def test_fewer_images_than_the_shards_hold_are_refused(workdir, shards):
    write_samples(workdir, 8, 1, f"{shards}/")
    before = content(shards)
    for fewer in (7, 4, 2):
        with pytest.raises(UserError, match=f"--num={fewer} is less than the 8 images that --out=.*shards/ holds"):
            write_samples(workdir, fewer, 1, f"{shards}/")
    assert content(shards) == before


@pytest.mark.slow
def test_last_shard_grows(workdir, shards):
    """A shorter shard that a killed process left beside it is deleted."""
    write_samples(workdir, 5, 1, f"{shards}/")
    (shards / "00000003-00000003.npz").write_bytes(b"of an earlier, smaller --num")
    (shards / "notes-of-mine.npz").write_bytes(b"")
    write_samples(workdir, 7, 1, f"{shards}/")
    names = ["00000000-00000002.npz", "00000003-00000005.npz", "00000006-00000006.npz"]
    assert sorted(content(shards)) == [*names, "notes-of-mine.npz", "samples.json"]


def test_damaged_shards_and_manifests_are_made_again(workdir, shards):
    write_samples(workdir, 9, 1, f"{shards}/")
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    kept = shards / "00000006-00000008.npz"
    time = kept.stat().st_mtime_ns
    (shards / "00000000-00000002.npz").write_bytes(b"")
    (shards / "00000003-00000005.npz").write_bytes(before["00000003-00000005.npz"][:-50])
    (shards / "samples.json").write_bytes(b"")
    write_samples(workdir, 9, 1, f"{shards}/")
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    assert kept.stat().st_mtime_ns == time


def test_a_shard_without_a_manifest_says_what_made_it(workdir, shards):
    write_samples(workdir, 2, 1, f"{shards}/")
    (shards / "samples.json").unlink()
    with pytest.raises(UserError, match="holds samples of another run, checkpoint, seed"):
        write_samples(workdir, 2, 2, f"{shards}/")
    assert not (shards / "samples.json").exists()


@pytest.mark.slow
def test_samples_hold_no_folder_of_the_machine_and_go_on_in_another(workdir, shards, tmp_path):
    write_samples(workdir, 2, 1, f"{shards}/")
    assert not [path for path in shards.iterdir() if str(workdir.parent).encode() in path.read_bytes()]
    moved = shutil.copytree(workdir, tmp_path / "moved")
    before = content(shards)
    write_samples(moved, 2, 1, f"{shards}/")
    assert {name: time for name, time in content(shards).items() if name != "samples.json"} == {
        name: time for name, time in before.items() if name != "samples.json"
    }


@pytest.mark.parametrize(
    "num, seed, out, message",
    [
        (0, 0, "x.npz", r"--num=0 must be an integer in 1\.\."),
        (2**32 + 1, 0, "x/", r"--num=4294967297 must be an integer in 1\.\.4,294,967,296"),
        (1, -1, "x.npz", r"--seed=-1 must be an integer in 0\.\."),
        (1, 2**32, "x.npz", r"--seed=4294967296 must be an integer in 0\.\.4,294,967,295"),
        (1, 0, "x.jpg", r"--out=.*x\.jpg must end in"),
        (1, 0, "folder.npz", r"--out=.*folder\.npz is a folder"),
        (1, 0, "file/", r"--out=.*file/ is a file"),
        (1, 0, "file/x.png", r"--out=.*file/x\.png cannot be written"),
        (1, 0, "file/x/", r"--out=.*file/x/ cannot be written"),
    ],
)
def test_unusable_flags_are_refused_before_the_checkpoint_is_read(
    workdir, tmp_path, monkeypatch, num, seed, out, message
):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(samples, "ema_params", None)
    with pytest.raises(UserError, match=message):
        write_samples(workdir, num, seed, f"{tmp_path}/{out}")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_samples_do_not_depend_on_x64(workdir, tmp_path, monkeypatch, sampler):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_samples(workdir, 3, 1, "~/single.npz", sampler=sampler)
    with jax.enable_x64(True):
        write_samples(workdir, 3, 1, "~/double.npz", sampler=sampler)
    single, double = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("single.npz", "double.npz"))
    assert abs(single - double).max() <= 1


def set_keys(workdir, **keys):
    """Changes keys of the run's config.json."""
    config = workdirs.read_config(workdir).unlock()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    workdirs.write_config(workdir, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key, value",
    [
        ("sampling__clip", False),
        ("sampling__sigma", "posterior"),
        ("sampling__sampler", "ddim"),
        ("model__dtype", "bfloat16"),
    ],
)
def test_shards_of_another_chain_are_refused(workdir, shards, key, value):
    """The flags are the same, and the config has changed."""
    write_samples(workdir, 2, 1, f"{shards}/")
    before = (workdir / "config.json").read_text()
    try:
        set_keys(workdir, **{key: value})
        with pytest.raises(UserError, match="holds samples of another run"):
            write_samples(workdir, 4, 1, f"{shards}/")
    finally:
        (workdir / "config.json").write_text(before)


@pytest.mark.slow
def test_shards_of_the_same_chain_are_continued(workdir, shards):
    """Flags that repeat the config, and keys that the sampler does not use, do not change the chain."""
    write_samples(workdir, 2, 1, f"{shards}/", sampler="ddim", steps=20)
    before = (workdir / "config.json").read_text()
    try:
        set_keys(workdir, sampling__sigma="posterior")
        write_samples(workdir, 3, 1, f"{shards}/", sampler="ddim", eta=0.0)
    finally:
        (workdir / "config.json").write_text(before)


@pytest.mark.slow
def test_samples_state_their_origin(workdir, tmp_path):
    write_samples(workdir, 5, 1, str(tmp_path / "samples.npz"), sampler="ddim", steps=4, eta=1)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert set(file) == {"arr_0", "about"} and file["arr_0"].shape == (5, 8, 8, 1)
        about = json.loads(str(file["about"]))
    checksum = about.pop("checksum")
    chain = {"sampler": "ddim", "steps": 4, "schedule": "su_linear, T = 20", "eta": 1.0}
    chain |= {"sigma": None, "clip": True, "dtype": "float32"}
    assert about == {"workdir": workdir.name, "step": 0, "seed": 1, "first": 0, "num": 5} | chain
    for eta, stated in ((0.0, None), (1.0, 1.0)):  # without noise as earlier versions stated it
        write_samples(workdir, 1, 1, str(tmp_path / "samples.npz"), sampler="dpmpp_2m", steps=2, eta=eta)
        with np.load(tmp_path / "samples.npz") as file:
            assert json.loads(str(file["about"]))["eta"] == stated
    write_samples(workdir, 2, 1, f"{tmp_path}/shards/")
    of_shards = json.loads((tmp_path / "shards" / "samples.json").read_text())
    assert of_shards["checksum"] == checksum and of_shards["sigma"] == "beta" and of_shards["steps"] == 20


def test_samples_of_an_array_are_in_its_range_and_type(tmp_path):
    """Writes integers as integers, and float32 for a run of an earlier version. A grid has a row for each channel."""
    shape = {"data__channels": 2, "data__range": (-3, 7)}
    write_random_run(tmp_path / "run", **shape)
    options = {"sampler": "ddim", "steps": 2}
    made = {}
    for dtype in ("", "float32", "int8", "uint16"):
        set_keys(tmp_path / "run", data__dtype=dtype)
        write_samples(tmp_path / "run", 3, 1, str(tmp_path / "x.npz"), **options)
        with np.load(tmp_path / "x.npz") as file:
            made[dtype] = file["arr_0"]
            assert json.loads(str(file["about"])).get("data_dtype") == (dtype if "int" in dtype else None)
    assert [x.dtype for x in made.values()] == ["float32", "float32", "int8", "uint16"]
    np.testing.assert_array_equal(made[""], made["float32"])
    np.testing.assert_array_equal(made["int8"], np.clip(np.rint(made[""]), -3, 7))
    np.testing.assert_array_equal(made["uint16"], np.clip(np.rint(made[""]), 0, 7))
    write_samples(tmp_path / "run", 3, 1, str(tmp_path / "x.png"), **options)
    with Image.open(tmp_path / "x.png") as grid:
        assert grid.mode == "L" and grid.height < grid.width  # two rows of three


def test_a_grid_of_pictures_with_alpha_is_rgba(tmp_path):
    write_random_run(tmp_path / "run", data__channels=4)
    write_samples(tmp_path / "run", 2, 1, str(tmp_path / "x.png"), sampler="ddim", steps=2)
    with Image.open(tmp_path / "x.png") as grid:
        assert grid.mode == "RGBA"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num": 0}, r"num=0 must be an integer in 1\.\."),
        ({"num": 2**32}, r"num=4294967296 must be an integer in 1\.\."),
        ({"num": -1}, r"num=-1 must be an integer in 1\.\."),
        ({"num": 2.0}, r"num=2\.0 must be of type int"),
        ({"num": True}, "num=True must be of type int"),
        ({"clip": (-1, 1)}, r"clip=\(-1, 1\) must be of type bool"),
        ({"clip": 1}, "clip=1 must be of type bool"),
        ({"steps": "5"}, "steps='5' must be of type int"),
        ({"eta": "1"}, "eta='1' must be of type float"),
        ({"dtype": np.float32}, "dtype=.* must be of type str"),
        ({"sampler": 3}, "sampler=3 must be of type str"),
        ({"eta": 0.0}, r"eta=0\.0 applies to ddim and dpmpp_2m, but the sampler is ancestral: leave it out"),
    ],
)
def test_unusable_arguments_are_refused(workdir, settings, message):
    with pytest.raises(UserError, match=message):
        sample.load(workdir, **settings)


def test_numbers_of_numpy_are_accepted(workdir):
    for sampler in ("ddim", "dpmpp_2m"):
        sample.load(workdir, num=np.int64(2), sampler=sampler, steps=np.int32(3), eta=np.float32(0.5), clip=False)
