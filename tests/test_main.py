"""The command line, as a user types it. One process per test: flags are global."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent


def main(*args, devices=4):
    """Runs main.py; the compilation cache of the tests is handed on."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(ROOT / "main.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False, timeout=300)


def train(workdir, *args, devices=4):
    return main("--config=configs/tiny.py", f"--workdir={workdir}", *args, devices=devices)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    done = train(os.path.relpath(workdir, ROOT), "--config.train.num_steps=20")
    assert done.returncode == 0, done.stderr
    assert "samples: " in done.stdout
    assert re.search(r"first step after \d+\.\d s, compiled", done.stdout)
    return workdir


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_20_steps_on_1_and_4_devices_agree(trained, tmp_path):
    """Dropout, noise, t and data included."""
    assert train(tmp_path, "--config.train.num_steps=20", devices=1).returncode == 0
    np.testing.assert_allclose(losses(tmp_path), losses(trained), rtol=0, atol=1e-6)


def test_sample_writes_a_grid_and_arrays(trained, tmp_path):
    grid, few, many = tmp_path / "grid.png", tmp_path / "few.npz", tmp_path / "many.npz"
    for out, num in ((grid, 9), (few, 2), (many, 9)):
        done = main("--mode=sample", f"--workdir={trained}", f"--num={num}", "--seed=1", f"--out={out}")
        assert done.returncode == 0, done.stderr
        assert f"{num} samples: {out}" in done.stdout
    with Image.open(grid) as image:
        assert image.size == (3 * 68 + 4, 3 * 68 + 4)
    few, many = np.load(few)["arr_0"], np.load(many)["arr_0"]
    assert many.shape == (9, 8, 8, 1)
    assert many.dtype == np.uint8
    assert abs(few.astype(int) - many[:2]).max() <= 1  # 1e-4 may round to the next grey level
    assert len(np.unique(many.reshape(9, -1), axis=0)) == 9


BAD = {
    "unknown key": (["--config.train.nmu_steps=3"], "train.nmu_steps is no key .* nearest is config.train.num_steps"),
    "wrong type": (["--config.train.num_steps=abc"], "--config.train.num_steps=abc: invalid literal"),
    "no steps": (["--config.schedule.num_steps=0"], "schedule.num_steps=0 must be an integer >= 1"),
    "batch": (["--config.train.batch_size=6"], "batch_size=6 does not divide among 4 devices: .* multiple of 4"),
    "image size": (["--config.data.image_size=9", "--config.model.multipliers=(1,2)"], "image_size=9 does not fit"),
    "no data": (["--config.data.path=/nowhere"], "data.path='/nowhere' does not exist"),
    "no data set": (["--config.data.source=tfds:dogs"], "'tfds:dogs' is not a TFDS data set"),
    "no config": (["--config=configs/nothing.py"], "--config: .*configs/nothing.py"),
    "no flag": (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    "no dashes": (["resume"], "'resume' is no flag"),
    "workdir is a file": ([f"--workdir={ROOT / 'main.py'}"], "main.py is a file"),
    "nothing to sample": (["--mode=sample"], "holds no run"),
    "no such mode": (["--mode=dance"], "--mode=dance.*train\\|prepare"),
    "config of a sample": (["--mode=sample", "--config=configs/tiny.py"], "--config does not go with --mode=sample"),
    "config of a report": (["--mode=report", "--config=configs/tiny.py"], "--config does not go with --mode=report"),
    "steps of diffusers": (
        ["--mode=export", "--format=diffusers", "--steps=5"],
        "--steps does not go with --format=diff",
    ),
    "no such show": (["--mode=sample", "--show=dance"], "--show=dance.*interpolation"),
    "sampler of a show": (["--mode=sample", "--show=variations", "--steps=5"], "--steps does not go with --show"),
    "no such format": (["--mode=sample", "--out=x.gif"], "--out=x.gif must end in .png .* .npz"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(tmp_path, args, message):
    config = [] if args[0].startswith("--mode") else ["--config=configs/tiny.py"]
    done = main(*config, f"--workdir={tmp_path / 'new'}", *args)
    assert done.returncode == 1
    assert re.fullmatch("error: [^\n]+\n", done.stderr), done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "new").exists()


def test_another_model_in_the_workdir_is_refused(trained):
    before = (trained / "config.json").read_text()
    done = train(trained, "--config.model.channels=16")
    assert done.returncode == 1
    assert "holds another run (config.model.channels: 8 there, 16 here)" in done.stderr
    assert (trained / "config.json").read_text() == before


def test_a_corrupt_image_in_a_folder_is_named(tmp_path):
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "broken.jpg").write_bytes(b"no picture")
    path = [f"--config.data.path={tmp_path / 'faces'}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    done = train(tmp_path / "new", *path)
    assert done.returncode == 1
    assert "error: image broken.jpg: cannot identify image file" in done.stderr
    assert "skip_corrupt=True" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TFDS would download")
def test_celeba_without_data_says_what_to_do(tmp_path):
    """The command of the README on a machine that has neither TensorFlow nor the data."""
    workdir = f"--workdir={tmp_path / 'new'}"
    done = main("--config=configs/celeba.py", workdir, f"--config.data.path={tmp_path}")  # empty: for TFDS
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*tfds:celeb_a.*requirements-prepare\.txt.*folder or a zip.*\n", done.stderr)


def test_prepare_makes_the_cache_that_training_uses(tmp_path):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    done = main("--mode=prepare", "--config=configs/digits.py", cache)
    assert done.returncode == 0, done.stderr
    assert "1,797 images, 8x8x1, ready in" in done.stdout
    (folder,) = (tmp_path / "cache").iterdir()
    assert str(folder) in done.stdout
    assert np.load(folder / "labels.npy")[:3].tolist() == [0, 1, 2]
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert "1,797 images" in main("--mode=prepare", "--config=configs/digits.py", cache).stdout
    assert (folder / "manifest.json").stat().st_mtime_ns == before


# The network of tests/fixtures/diffusers as a config of its own.
FIXTURE = (
    *("--config=configs/default.py", "--config.data.image_size=8", "--config.model.channels=4"),
    *("--config.model.multipliers=(1,2,2)", "--config.model.attention_resolutions=(4,)"),
    *("--config.model.num_groups=2", "--config.model.num_res_blocks=1", "--config.model.dropout=0.2"),
    *("--config.train.num_steps=2", "--config.train.batch_size=4", "--config.sampling.num=4"),
    *("--config.sampling.sampler=dpmpp_2m", "--config.sampling.steps=5"),
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def done(*args):
    result = main(*args, devices=1)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_trained_on(tmp_path, faces):
    """With the config that it was imported with."""
    workdir, file = f"--workdir={tmp_path / 'run'}", tmp_path / "run" / "config.json"
    config = [*FIXTURE, f"--config.data.path={faces}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    done("--mode=import", "--from=tests/fixtures/diffusers", workdir, *config)
    assert "bits_per_dim" in done("--mode=evaluate", workdir, "--num=2")
    assert "trained to step 2" in done(workdir, *config)
    file.write_text(file.read_text().replace(str(faces), "/nowhere"))
    refused = main("--mode=evaluate", workdir, "--num=2")
    assert re.search(r"'/nowhere' does not exist.*\(data\.\* of this run are in .*config\.json\)", refused.stderr)


@pytest.mark.slow
def test_a_run_imported_without_images_takes_those_of_its_training(tmp_path, faces):
    workdir, file = f"--workdir={tmp_path / 'run'}", tmp_path / "run" / "config.json"
    done("--mode=import", "--from=tests/fixtures/diffusers", workdir)
    for mode in ("--mode=evaluate", "--show=interpolation"):
        refused = main("--mode=sample", mode, workdir)
        assert refused.returncode == 1
        assert refused.stderr.strip().endswith(
            f"{file} names no images (data.path is empty, the run was imported): write data.path there"
        )
    config = [*FIXTURE, f"--config.data.path={faces}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    refused = main(workdir, *config, "--config.model.num_res_blocks=2")
    assert "holds another run (config.model.num_res_blocks: 1 there, 2 here)" in refused.stderr
    assert "trained to step 2" in done(workdir, *config)
    content = json.loads(file.read_text())
    assert content["data"]["path"] == str(faces) and content["model"]["dropout"] == 0.2
    moved = main(workdir, *config, "--config.data.path=elsewhere")
    assert f"holds another run (config.data.path: '{faces}' there, 'elsewhere' here)" in moved.stderr


def test_debug_shows_the_traceback(tmp_path):
    done = train(tmp_path / "new", "--config.schedule.num_steps=0", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_importing_touches_no_device():
    """Where a device has been touched, JAX takes no other number of them."""
    code = (
        "import diffusion_jax, jax; diffusion_jax.load, diffusion_jax.load_network, diffusion_jax.load_exported; "
        "jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
