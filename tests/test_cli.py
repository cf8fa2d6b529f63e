"""The command line as a user types it; most commands run in this process, where imports and programs are warm."""

import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import bad_inputs
import jax
import numpy as np
import pytest
from conftest import write_random_run
from PIL import Image

import diffusion_jax
from diffusion_jax import cli
from diffusion_jax.commands import flags
from diffusion_jax.data.pixels import to_uint8

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def command(capsys, monkeypatch):
    """command(*args) -> (exit code, stdout, stderr), on the 4 devices of the tests."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.hosts, "silence_libraries", lambda: None)  # it would silence later tests too
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # restored afterwards

    def run(*args):
        capsys.readouterr()
        code = cli.main(["diffusion_jax", *map(str, args)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def done(command):
    """done(*args) -> stdout of a command that succeeds."""

    def run(*args):
        code, out, err = command(*args)
        assert code == 0, err
        return out

    return run


# Runs command lines one after the other until one fails, whose exit code it has.
IN_TURN = (
    "import json, sys; from diffusion_jax import cli; "
    "sys.exit(next((code for line in json.loads(sys.argv[1]) if (code := cli.main(['diffusion_jax', *line]))), 0))"
)


def start(*arguments, devices=1, **env):
    """Starts Python with the arguments in a process of its own, with the compilation cache of the tests."""
    env = (
        os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        }
        | env
    )
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def process(*args, **settings):
    """Runs main.py in a process of its own and returns (exit code, stdout, stderr)."""
    running = start("main.py", *map(str, args), **settings)
    out, err = running.communicate(timeout=300)
    return running.returncode, out, err


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of configs/tiny.py with random parameters."""
    workdir = tmp_path_factory.mktemp("run")
    write_random_run(workdir)
    return workdir


@pytest.mark.slow
def test_training_by_main_py_on_1_device_takes_the_steps_of_4_devices(done, tmp_path):
    """The losses agree, dropout, noise, t and data included. The workdir is relative to the checkout."""
    workdir = os.path.relpath(tmp_path / "one", ROOT)
    code, out, err = process("--config=configs/tiny.py", f"--workdir={workdir}")
    assert code == 0, err
    assert "samples: " in out
    assert re.search(r"first step after \d+\.\d s, compiled", out)
    done("--config=tiny", f"--workdir={tmp_path / 'four'}")
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "four"), rtol=0, atol=1e-6)


def together(*lines):
    """Runs the command lines on two processes with 2 devices each; returns their exit codes and errors.

    The processes run them in turn and find each other by the flags of the first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = []
    for i in range(2):
        group = [f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"]
        pair.append(start("-c", IN_TURN, json.dumps([[*lines[0], *group], *lines[1:]]), devices=2))
    errors = [running.communicate(timeout=300)[1] for running in pair]
    return [running.returncode for running in pair], errors


@pytest.mark.slow
def test_two_processes_take_the_steps_and_draw_the_samples_of_one(done, tmp_path):
    """The losses of 20 steps agree."""
    run, whole = f"--workdir={tmp_path / 'run'}", f"--workdir={tmp_path / 'whole'}"
    training = ["--config=tiny", "--config.train.num_steps=20", "--config.sampling.num=5"]
    sample = ["--mode=sample", run, "--num=5"]
    codes, errors = together([*training, run], [*sample, f"--out={tmp_path / 'two.npz'}"])
    assert codes == [0, 0], errors
    done(*training, whole)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=0, atol=1e-6)
    done(*sample, f"--out={tmp_path / 'one.npz'}")
    two, one = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("two.npz", "one.npz"))
    assert two.shape == one.shape and abs(two - one).max() <= 1  # rounding may reach the next grey level


@pytest.mark.slow
def test_of_two_processes_the_first_imports_and_exports(tmp_path):
    """Each of the two exits with an error if the run is there."""
    run = f"--workdir={tmp_path / 'run'}"
    codes, errors = together(
        ["--mode=import", "--from=tests/fixtures/diffusers", run],
        ["--mode=export", "--format=diffusers", run, f"--out={tmp_path / 'folder'}"],
        ["--mode=export", run, f"--out={tmp_path / 'old.npz'}"],
        ["--mode=export", f"--from={tmp_path / 'old.npz'}", f"--out={tmp_path / 'new.npz'}"],
        ["--mode=import", "--from=tests/fixtures/diffusers", run],
    )
    assert codes == [1, 1] and all("holds a run already" in error for error in errors), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder",
        "new-card.md",
        "new.npz",
        "old-card.md",
        "old.npz",
        "run",
    ]


def test_sample_writes_a_grid_and_arrays(done, run, tmp_path):
    grid, few, many = tmp_path / "grid.png", tmp_path / "few.npz", tmp_path / "many.npz"
    for out, num in ((grid, 9), (few, 2), (many, 9)):
        printed = done("--mode=sample", f"--workdir={run}", f"--num={num}", "--seed=1", f"--out={out}")
        assert f"{num} samples: {out}" in printed
    printed = done("--mode=sample", f"--workdir={run}", "--num=9", "--seed=1", f"--out={grid}")
    assert f"9 samples: {grid}, in place of the file that was there" in printed
    with Image.open(grid) as image:
        assert image.size == (3 * 68 + 4, 3 * 68 + 4)
    few, many = np.load(few)["arr_0"], np.load(many)["arr_0"]
    assert many.shape == (9, 8, 8, 1)
    assert many.dtype == np.uint8
    assert abs(few.astype(int) - many[:2]).max() <= 1  # 1e-4 may round to the next grey level
    assert len(np.unique(many.reshape(9, -1), axis=0)) == 9


# ---------------------------------------------------------------- the table of modes


@pytest.mark.parametrize("name", cli.MODES)
def test_help_of_a_mode(name, done):
    mode = cli.MODES[name]
    flags = [arg for arg in mode.example.split() if not arg.startswith(("--config", "--workdir"))]
    printed = done(*flags, "--help")
    assert mode.purpose in printed and mode.example in printed
    for flag in (*mode.needs, *mode.takes):
        assert f"--{flag} " in printed


@pytest.mark.parametrize("name", cli.MODES)
def test_a_mode_refuses_flags_that_it_does_not_take(name, command):
    mode = cli.MODES[name]
    example = [arg for arg in mode.example.split() if not arg.startswith("--config.")]
    values = {"num": "5", "sampler": "ddim", "steps": "5", "eta": "0.5", "topology": "v5e:2x4", "config": "tiny"}
    values |= dict.fromkeys(("workdir", "out", "images", "splits", "samples", "inception", "reference", "from"), "x")
    values |= {"seed": "1", "search": "false"}
    refused = values.keys() - {*mode.needs, *mode.takes}
    assert refused
    for flag in refused:
        code, _, err = command(*example, f"--{flag}={values[flag]}")
        assert code == 1 and f"error: --{flag} does not go with --mode={name}" in err, err


@pytest.mark.parametrize("name", cli.MODES)
def test_a_mode_names_the_flag_that_it_lacks(name, command):
    """The flags that choose between the rows of a mode cannot be missing; `bad_inputs` has an export of nothing."""
    mode = cli.MODES[name]
    example = [arg for arg in mode.example.split() if not arg.startswith("--config.")]
    for flag in set(mode.needs) - {"show", "format"}:
        code, _, err = command(*(arg for arg in example if not arg.startswith(f"--{flag}=")))
        assert code == 1 and f"error: --{flag} is missing: give" in err


def test_a_config_is_a_shipped_name_or_a_file(done, command, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from diffusion_jax.configs import tiny\n\ndef get_config():\n    config = tiny.get_config()\n"
        "    config.train.ema_decay = 0.5\n    return config\n"
    )
    assert "| EMA decay                               | 0.5" in done("--mode=audit", f"--config={file}")
    assert "| EMA decay                               | 0.995" in done("--mode=audit", "--config=tiny")
    code, _, err = command("--mode=audit", "--config=tinny")
    assert code == 1 and "--config=tinny is not a shipped config: did you mean tiny? There are celeba, celebah" in err
    code, _, err = command("--mode=audit", "--config=xyz")
    assert code == 1 and "--config=xyz is not a shipped config: give one of celeba, celebahq256, cifar10, " in err


def test_help_names_the_program_and_asks_for_no_figure(done, monkeypatch):
    monkeypatch.setattr(flags.sys, "argv", ["main.py"])
    printed = done("--mode=sample", "--show", "--help")
    assert "--mode=sample --show: Draws a figure" in printed and "\n    python main.py --mode=sample" in printed
    monkeypatch.setattr(flags.sys, "argv", ["/usr/bin/diffusion_jax"])
    assert "\n    diffusion_jax --mode=sample" in (printed := done("--mode=sample", "--help"))
    assert "--show" in printed


def test_a_path_may_begin_in_the_home_directory(done, tmp_path, monkeypatch):
    """A shell leaves --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from diffusion_jax.configs.tiny import get_config\n")
    done("--mode=audit", "--config=~/mine.py", "--out=~/audit.md")
    assert (tmp_path / "audit.md").exists() and not (ROOT / "~").exists()
    args = ["--workdir=~/run", "--images", "~/zip", "--samples=~/x/", "--config=tiny", "--config.data.path=~/faces"]
    parsed = flags.parse(["diffusion_jax", *args, "--out=gs://bucket/~x", "--seed=1"], ["train"])
    assert (parsed.workdir, parsed.images) == (f"{tmp_path}/run", f"{tmp_path}/zip")
    assert (parsed.samples, parsed.config.data.path) == (f"{tmp_path}/x/", f"{tmp_path}/faces")
    assert parsed.out == "gs://bucket/~x"


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
    return bad_inputs.cases(tmp_path_factory.mktemp("mistakes") / "files", run)


@pytest.mark.parametrize("name", bad_inputs.NAMES)
def test_a_mistake_is_one_line_with_the_mend(name, mistakes, command, run):
    args, message = mistakes[name]
    before = (run / "config.json").read_text()
    code, _, err = command(*args)
    assert code == 1
    last = err.splitlines()[-1]  # a bar may stand before it
    assert last.startswith("error: ") and "Traceback" not in err, err
    assert re.search(message, last), err
    assert not (mistakes.folder / "new").exists()
    assert (run / "config.json").read_text() == before


def test_every_mistake_is_tried(mistakes):
    assert sorted(mistakes) == sorted(bad_inputs.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("platform, extra", [("tpu", "tpu"), ("gpu", "cuda12")])
def test_a_platform_that_is_not_there(platform, extra, tmp_path):
    code, _, err = process("--config=tiny", f"--workdir={tmp_path / 'new'}", f"--platform={platform}", JAX_PLATFORMS="")
    assert code == 1
    assert re.search(rf"^error: --platform={platform}.*jax\[{extra}\]", err, re.MULTILINE)


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TFDS would download")
def test_celeba_without_data_says_what_to_do(command, tmp_path):
    """The command of the README on a machine that has neither TensorFlow nor the data."""
    workdir = f"--workdir={tmp_path / 'new'}"
    (tmp_path / "tfds").mkdir()
    code, _, err = command("--config=celeba", workdir, f"--config.data.path={tmp_path / 'tfds'}")  # empty: for TFDS
    assert code == 1
    assert re.search(r"error: .*tfds:celeb_a.*requirements-prepare\.txt.*folder or a zip.*\n", err)


@pytest.mark.parametrize("mode", [["--mode=sample"], ["--mode=report"], ["--config=tiny"]])
def test_ctrl_c_ends_a_mode_with_one_line(command, tmp_path, monkeypatch, mode):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "MODES", {name: row._replace(run=interrupted) for name, row in cli.MODES.items()})
    code, _, err = command(*mode, f"--workdir={tmp_path}")
    assert (code, err) == (130, "stopped by Ctrl-C\n")


def test_debug_shows_the_traceback(command, tmp_path):
    with pytest.raises(diffusion_jax.errors.UserError):
        command("--config=tiny", f"--workdir={tmp_path / 'new'}", "--config.schedule.num_steps=0", "--debug")


# ---------------------------------------------------------------- from the first picture to a trained network


def test_prepare_makes_the_cache_that_training_uses(done, tmp_path):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    out = f"--out={tmp_path / 'prepared.png'}"
    printed = done("--mode=prepare", "--config=digits", cache, out)
    assert "1,797 images, 8x8x1, ready in" in printed
    assert printed.endswith(f"16 of the images: {tmp_path / 'prepared.png'}\n")
    (folder,) = (tmp_path / "cache").iterdir()
    assert str(folder) in printed
    assert np.load(folder / "labels.npy")[:3].tolist() == [0, 1, 2]
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert "1,797 images" in done("--mode=prepare", "--config=digits", cache, out)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("shape, how", [((16,), "as curves"), ((4, 8, 2), "the middle slice of each")])
def test_signals_and_volumes_from_the_array_to_samples(done, command, tmp_path, shape, how):
    """Each mode takes them, or says in one line that it does not."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (64, *shape, 2), np.uint8))
    data = f"--config.data.path={tmp_path / 'x.npy'}", f"--config.data.cache_dir={tmp_path / 'cache'}"
    size = "--config.data.image_size=(" + "".join(f"{n}," for n in shape) + ")", "--config.data.channels=2"
    config = ["--config=tiny", *data, *size, "--config.model.multipliers=(1,2)", "--config.train.evaluate_every=6"]
    config += ["--config.sampling.num=5"]  # the grid of the training and the samples are one program
    printed = done("--mode=prepare", *config, f"--out={tmp_path / 'prepared.png'}")
    assert f"64 images, {'x'.join(map(str, shape))}x2, ready" in printed and f"16 of the images, {how}: " in printed
    assert f"samples, {how}: " in done(*config, f"--workdir={tmp_path / 'a'}")
    run = f"--workdir={tmp_path / 'a'}"
    done("--mode=sample", run, "--num=5", f"--out={tmp_path / 'a.npz'}")
    x = np.load(tmp_path / "a.npz")["arr_0"]
    assert x.shape == (5, *shape, 2) and x.dtype == np.uint8
    assert f"5 samples, {how}: " in done("--mode=sample", run, "--num=5", f"--out={tmp_path / 'a.png'}")
    done("--mode=sample", run, "--num=200", f"--out={tmp_path / 'many.npz'}")
    printed = done("--mode=evaluate", run, "--num=8", "--quick", f"--samples={tmp_path / 'many.npz'}")
    assert "bits_per_dim" in printed and "resize: none" in printed
    done("--mode=sample", run, "--show=reconstruction", "--num=2", f"--out={tmp_path / 'show.png'}")
    for mistake, message in (
        (["--mode=sample", "--show=inpainting"], r"--show=inpainting masks halves of images, but the run's have \("),
        (
            ["--mode=export", "--format=diffusers"],
            r"data\.image_size=\(.*\) is not of images, as diffusers' are: leave",
        ),
        (["--mode=evaluate", "--samples=x.npz", "--inception=y"], r"--inception=y looks at images, but the run's have"),
    ):
        code, _, err = command(*mistake, run)
        assert code == 1 and re.fullmatch(
            rf"error: [^\n]*{message}[^\n]*\n", err.replace("\r", "\n").splitlines(True)[-1]
        )
    done("--mode=export", run, f"--out={tmp_path / 'sampler.npz'}")
    sample_fn, params = diffusion_jax.load_exported(tmp_path / "sampler.npz")
    drawn = to_uint8(sample_fn(params, jax.random.key(0), 5))
    assert abs(drawn.astype(int) - x).max() <= 1  # compiled as another program
    kind = "signals of 16 values" if len(shape) == 1 else "volumes of 4×8×2 voxels"
    assert f"of {kind} with 2 channel(s)" in (tmp_path / "sampler-card.md").read_text()
    assert " × ".join(map(str, (*shape, 2))) in (tmp_path / "a/report.html").read_text()
    done("--mode=audit", *config)


# The network of tests/fixtures/diffusers as a config of its own.
FIXTURE = (
    *("--config=default", "--config.data.image_size=8", "--config.model.channels=4"),
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


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_trained_on(done, command, tmp_path, faces):
    """With the config that it was imported with."""
    workdir, file = f"--workdir={tmp_path / 'run'}", tmp_path / "run" / "config.json"
    config = [*FIXTURE, f"--config.data.path={faces}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    done("--mode=import", "--from=tests/fixtures/diffusers", workdir, *config)
    assert "bits_per_dim" in done("--mode=evaluate", workdir, "--num=2", "--quick")
    assert "trained to step 2" in done(workdir, *config)
    file.write_text(file.read_text().replace(str(faces), "/nowhere"))
    code, _, err = command("--mode=evaluate", workdir, "--num=2", "--quick")
    assert code == 1
    assert re.search(r"'/nowhere' does not exist.*\(data\.\* of this run are in .*config\.json\)", err)


@pytest.mark.slow
def test_a_run_imported_without_images_takes_those_of_its_training(done, command, tmp_path, faces):
    workdir, file = f"--workdir={tmp_path / 'run'}", tmp_path / "run" / "config.json"
    done("--mode=import", "--from=tests/fixtures/diffusers", workdir)
    for args in (["--mode=evaluate"], ["--mode=sample", "--show=interpolation"]):
        code, _, err = command(*args, workdir)
        assert code == 1
        assert err.strip().endswith(
            f"{file} names no images (data.path is empty, the run was imported): set data.path there"
        )
    config = [*FIXTURE, f"--config.data.path={faces}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    _, _, err = command(workdir, *config, "--config.model.num_res_blocks=2")
    assert "holds another run (config.model.num_res_blocks: 1 there, 2 here)" in err
    assert "trained to step 2" in done(workdir, *config)
    content = json.loads(file.read_text())
    assert content["data"]["path"] == str(faces) and content["model"]["dropout"] == 0.2
    _, _, err = command(workdir, *config, "--config.data.path=elsewhere")
    assert f"holds another run (config.data.path: '{faces}' there, '{ROOT / 'elsewhere'}' here)" in err


# ---------------------------------------------------------------- the package


def test_importing_touches_no_device_and_the_mathematics_needs_no_flax():
    """JAX takes another number of devices only before it has touched one."""
    code = (
        "import sys, jax; from diffusion_jax import losses, sampling; "
        "assert not {'flax', 'orbax'} & sys.modules.keys(); "
        "import diffusion_jax; diffusion_jax.load, diffusion_jax.load_network, diffusion_jax.load_exported; "
        "assert all(hasattr(diffusion_jax, name) for name in dir(diffusion_jax)); "
        "jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_the_package_shows_what_it_offers():
    assert {"load", "load_network", "load_exported", "__version__", "sampling"} <= set(dir(diffusion_jax))
    assert "importlib" not in dir(diffusion_jax)
    assert re.fullmatch(r"\d+\.\d+\.\d+", diffusion_jax.__version__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        diffusion_jax.lode  # noqa: B018
