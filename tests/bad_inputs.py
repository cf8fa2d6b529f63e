"""Mistakes of users, and the messages that must report them."""

import gzip
import json
import pathlib
import shutil
import struct
import zipfile

import numpy as np
from PIL import Image


class Cases(dict):
    """{name: (arguments, pattern of the message)}; the commands that would make a workdir name folder/new."""

    def __init__(self, folder, cases):
        super().__init__(cases)
        self.folder = folder


def cases(folder: pathlib.Path, run: pathlib.Path) -> Cases:
    """Returns all cases and writes their files to `folder`.

    Args:
      folder: a path that does not exist yet.
      run: the workdir of a finished run of configs/tiny.py.
    """
    _write_files(folder / "files", run)
    return Cases(folder, _cases(folder, run))


def _cases(folder, run):
    command, new, files = "--config=configs/digits.py", f"--workdir={folder / 'new'}", folder / "files"
    cache = f"--config.data.cache_dir={folder / 'cache'}"

    def config(key, value):
        return [command, new, f"--config.{key}={value}"]

    def data(name, *flags):
        return [command, new, f"--config.data.path={files / name}", cache, *flags]

    return (
        _config_cases(config, new, files)
        | _command_line_cases([command, new], files)
        | _data_cases(config, data, files)
        | _workdir_cases(command, run, files)
    )


def _config_cases(config, new, files):
    return {
        "a tuple twice": (
            [*config("model.multipliers", "(1, 2)"), "--config.model.multipliers=(1,)"],
            r"config\.model\.multipliers is given 2 times: give it once",
        ),
        "unknown key": (config("train.nmu_steps", 3), r"train\.nmu_steps .*nearest is config\.train\.num_steps"),
        "unknown section": (config("trian.num_steps", 3), r"trian\.num_steps .*nearest is config\.train\.num_steps"),
        "text for a number": (config("train.num_steps", "many"), r"train\.num_steps=many"),
        "fraction for a count": (config("train.batch_size", 7.5), r"train\.batch_size=7\.5"),
        "no steps": (config("schedule.num_steps", 0), r"schedule\.num_steps=0 must be an integer in 1\.\.16,777,216"),
        "negative steps": (config("train.num_steps", -5), r"train\.num_steps=-5 must be"),
        "unknown schedule": (config("schedule.name", "linear"), r"schedule\.name='linear' must be one of su_linear"),
        "unknown loss": (config("train.loss", "l2"), r"train\.loss='l2' must be one of simple"),
        "unknown sigma": (config("sampling.sigma", "large"), r"sampling\.sigma='large' must be one of zero"),
        "unknown dtype": (config("model.dtype", "float16"), r"model\.dtype='float16' must be one of float32"),
        "no channels": (config("data.channels", 0), r"data\.channels=0 must be an integer in 1\.\.1,024"),
        "no pair as range": (
            config("data.range", "(1,)"),
            r"data\.range=\(1,\) must be \(\) or two numbers \(lo, hi\)",
        ),
        "range of nothing": (config("data.range", "(2, 2)"), r"data\.range=\(2, 2\) must be .* with lo < hi"),
        "three numbers as range": (
            config("data.range", "(0, 1, 2)"),
            r"data\.range=\(0, 1, 2\) must be \(\) or two numbers",
        ),
        "range from high to low": (config("data.range", "(7, -3)"), r"data\.range=\(7, -3\) must be .* with lo < hi"),
        "endless range": (config("data.range", "(0, 1e999)"), r"data\.range=\(0, inf\) must be \(\) or two numbers"),
        "range of words": (config("data.range", "('a', 'b')"), r"data\.range=\('a', 'b'\) must be"),
        "a range that is no tuple": (config("data.range", "7"), r"data\.range"),
        "unknown type": (config("data.dtype", "complex64"), r"data\.dtype='complex64' must be one of "),
        "two channels of digits": (
            config("data.channels", 2),
            r"data\.channels=2 goes with arrays, .*: give 1 \(grey\)",
        ),
        "a height of nothing": (config("data.image_size", "(0, 8)"), r"data\.image_size=\(0, 8\) must be a number of"),
        "a word as size": (config("data.image_size", "abc"), r"data\.image_size='?abc'? must be a number of pixels"),
        "a size in text": (config("data.image_size", "16x8"), r"data\.image_size='?16x8'? must be a number of pixels"),
        "a size of fractions": (config("data.image_size", "(8.5, 8)"), r"data\.image_size=\(8\.5, 8\) must be"),
        "a narrow size": (
            config("data.image_size", "(16, 5)"),
            r"image_size=\(16, 5\) does not fit config\.model\.mul",
        ),
        "hub without an owner": (config("data.source", "hf:mnist"), r"source='hf:mnist' must be 'hf:<owner>/<name>'"),
        "hub's address": (
            config("data.source", "hf:https://huggingface.co/datasets/ylecun/mnist"),
            r"source='hf:https://.*' must be 'hf:<owner>/<name>'",
        ),
        "range of digits": (config("data.range", "(0, 1)"), r"data\.range=\(0, 1\) goes with arrays, \.npy or \.npz"),
        "importance without the bound": (
            config("train.t_sampling", "importance"),
            r"'importance' must be 'uniform' unless config\.train\.loss='vlb'",
        ),
        "no batch": (config("train.batch_size", 0), r"train\.batch_size=0 must be"),
        "batch and devices": (
            config("train.batch_size", 6),
            r"batch_size=6 does not divide among 4 devices.*multiple of 4",
        ),
        "image size": (config("data.image_size", 9), r"image_size=9 does not fit config\.model\.multipliers=\(1, 2\)"),
        "signals of digits": (
            config("data.image_size", "(8,)"),
            r"image_size=\(8,\) makes signals or volumes, which come from arrays alone, \.npy or \.npz: give one",
        ),
        "too many sizes": (
            config("data.image_size", "(8,8,8,8)"),
            r"image_size=\(8, 8, 8, 8\) must be .*; \(depth, height, width\) for volumes",
        ),
        "a volume that cannot be halved": (
            config("data.image_size", "(8,8,7)"),
            r"image_size=\(8, 8, 7\) does not fit .*: 8x8x7 cannot be halved 1 times",
        ),
        "a signal turned round": (
            [*config("data.image_size", "(8,)"), "--config.data.flip=True"],
            r"data\.flip=True must be False for signals",
        ),
        "a crop of signals": (
            [*config("data.image_size", "(8,)"), "--config.data.crop=4"],
            r"data\.crop=4 must be 0 for signals and volumes",
        ),
        "endless chain": (config("schedule.num_steps", 10**9), r"num_steps=1000000000 must be an integer in 1\.\."),
        "no image size": (config("data.image_size", 0), r"data\.image_size=0 must be"),
        "no learning rate": (config("train.learning_rate", 0.0), r"learning_rate=0\.0 must be a number > 0"),
        "infinite rate": (config("train.learning_rate", "inf"), r"learning_rate=inf must be a number > 0"),
        "negative clip": (config("train.grad_clip", -1.0), r"grad_clip=-1\.0 must be"),
        "ema of 1": (config("train.ema_decay", 1.0), r"ema_decay=1\.0 must be in \[0, 1\)"),
        "negative dropout": (config("model.dropout", -0.1), r"dropout=-0\.1 must be in \[0, 1\)"),
        "no number as rate": (config("train.learning_rate", "nan"), r"learning_rate=nan must be"),
        "negative image size": (
            config("data.image_size", -8),
            r"image_size=-8 must be a number of pixels in 1\.\.8,192",
        ),
        "dropout of 1": (config("model.dropout", 1.0), r"dropout=1\.0 must be in \[0, 1\)"),
        "odd channels": (config("model.channels", 7), r"model\.channels=7 must be even"),
        "no levels": (config("model.multipliers", "()"), r"multipliers=\(\) must be"),
        "level of nothing": (
            config("model.multipliers", "(1,0)"),
            r"multipliers=\(1, 0\) must be integers in 1\.\.",
        ),
        "negative seed": (config("seed", -1), r"config\.seed=-1 must be"),
        "negative crop": (config("data.crop", -3), r"data\.crop=-3 must be"),
        "negative warm-up": (config("train.warmup_steps", -1), r"warmup_steps=-1 must be"),
        "negative limit": (config("data.cache_limit_gb", -1.0), r"cache_limit_gb=-1\.0 must be"),
        "no checkpoints kept": (config("train.keep_checkpoints", 0), r"keep_checkpoints=0 must be"),
        "seed of 33 bits": (config("seed", 2**32), r"config\.seed=4294967296 must be an integer in 0\.\.4,294,967,295"),
        "steps of 32 bits": (
            config("train.num_steps", 2**31),
            r"num_steps=2147483648 must be .* 1\.\.2,147,483,647",
        ),
        "batch of 64 bits": (
            config("train.batch_size", 2**63),
            r"batch_size=9223372036854775808 must be an integer",
        ),
        "too many blocks": (config("model.num_res_blocks", 10**9), r"num_res_blocks=1000000000 must be .* 0\.\.64"),
        "rate beyond float32": (
            config("train.learning_rate", 1e39),
            r"learning_rate=1e\+39 must be .* float32's",
        ),
        "decay that rounds to 1": (config("train.ema_decay", 1 - 1e-9), r"ema_decay=0\.999999999 must be in \[0, 1\)"),
        "no config": ([new], r"--config is missing"),
        "missing config": (["--config=configs/nothing.py", new], r"--config: .*configs/nothing\.py"),
        "broken config": ([f"--config={files / 'broken.py'}", new], r"--config: .*broken\.py"),
    }


def _command_line_cases(digits, files):
    return {
        "unknown flag": ([*digits, "--wrkdir=x"], r"Unknown command line flag 'wrkdir'.*workdir"),
        "a flag of another project": (
            ["--mode=sample", "--workdir=run", "--num_samples=4"],
            r"--num_samples is no flag: give --num",
        ),
        "a key without a config": (
            [digits[1], "--config.train.num_steps=3"],
            r"--config\.train\.num_steps=3 needs --config too: give --config=own, another one of celeba",
        ),
        "a key of the config where a run has one": (
            ["--mode=sample", "--workdir=run", "--config.sampling.steps=10"],
            r"needs --config too: .*; to draw from a run in --workdir give --steps=10$",
        ),
        "a config with a slip": (
            ["--config=digit", digits[1]],
            r"is not a shipped config: did you mean digits\? There are",
        ),
        "a word for a number": ([*digits, "--config.train.num_steps=abc"], r"num_steps=abc: 'abc' is not an integer$"),
        "a word for a fraction": (
            [*digits, "--config.train.learning_rate=a"],
            r"learning_rate=a: 'a' is not a number$",
        ),
        "a figure without a name": (
            ["--mode=sample", "--workdir=run", "--show", "--num=3"],
            r"--show needs a figure: give --show= with one of interpolation, progressive, ",
        ),
        "the default config": (
            ["--config=default", digits[1]],
            r"data\.path is empty: .* another config, e\.g\. --config=own --config\.data\.path=",
        ),
        "an unknown size": (["--config=own:gpu", digits[1]], r"--config: own:gpu is no size: give own:cpu"),
        "a loss of Python": (
            [*digits, "--config.train.loss=python:mine"],
            r"loss='python:mine' is a function .*only Python can give: loss=mine to diffusion_jax\.train",
        ),
        "no dashes": ([*digits, "resume"], r"'resume' is not a flag"),
        "unknown mode": ([*digits, "--mode=test"], r"--mode=test"),
        "no workdir": (digits[:1], r"--workdir is missing"),
        "workdir is a file": ([digits[0], f"--workdir={files / 'text.txt'}"], r"text\.txt is a file"),
        "workdir below a file": (
            [digits[0], f"--workdir={files / 'text.txt' / 'run'}"],
            r"text\.txt/run cannot be written",
        ),
        "sampling seed of 33 bits": (
            ["--mode=sample", "--workdir=run", f"--seed={2**32}"],
            r"--seed=4294967296 must be an integer in 0\.\.4,294,967,295",
        ),
        "negative sampling seed": (
            ["--mode=sample", "--workdir=run", "--seed=-1"],
            r"--seed=-1 must be an integer",
        ),
        "seed of 64 bits": (
            ["--mode=evaluate", "--workdir=run", f"--seed={2**63}"],
            r"--seed=9223372036854775808 ",
        ),
        "samples of 33 bits": (["--mode=sample", "--workdir=run", f"--num={2**32 + 1}"], r"--num=4294967297 must be"),
        "processes of 64 bits": ([*digits, f"--num_processes={2**63}"], r"--num_processes=9223372036854775808 must be"),
        "third of two processes": (
            [*digits, "--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            r"--process_id=2 must be between 0 and 1 for --num_processes=2",
        ),
        "export of nothing": (["--mode=export"], r"--mode=export takes either --workdir=RUN or --from=SAMPLER\.npz"),
        "export of two things": (
            ["--mode=export", "--workdir=run", "--from=sampler.npz"],
            r"--mode=export takes either --workdir=RUN or --from=SAMPLER\.npz: give one of them",
        ),
        "charts of an export": (
            ["--mode=export", "--workdir=run", "--format=svg"],
            r"--format=svg does not go with --mode=export: give jax or diffusers",
        ),
    }


def _data_cases(config, data, files):
    return {
        "no such path": (data("nowhere"), r"data\.path='.*nowhere' does not exist"),
        "empty folder": (data("empty"), r"data\.path='.*empty' holds no images"),
        "text file": (data("text.txt"), r"text\.txt' must be a folder, a zip or an idx file"),
        "cut zip": (data("cut.zip"), r"cut\.zip' must be a folder, a zip or an idx file"),
        "cut image": (data("cut"), r"image cut\.png: .*skip_corrupt"),
        "nothing but cut images": (data("cut", "--config.data.skip_corrupt=True"), r"no image of .*cut can be read"),
        "bomb": (data("bomb"), r"image bomb\.png: 8000x8000 is more than"),
        "smaller than the crop": (
            data("small", "--config.data.crop=64"),
            r"image small\.png: 16x16 is smaller than the crop of 64",
        ),
        "no such split": (data("small", "--config.data.split=test"), r"data\.split='test': .*no images in a folder"),
        "idx of labels": (
            data("labels-idx1-ubyte"),
            r"labels-idx1-ubyte cannot be read .*not an idx file of uint8 images",
        ),
        "cut idx": (data("cut-images-idx3-ubyte.gz"), r"cut-images-idx3-ubyte\.gz cannot be read"),
        "unknown source": (config("data.source", "celeba"), r"data\.source='celeba' must be 'digits', 'tfds:<name>'"),
        "no path": (config("data.source", "files"), r"data\.path is empty"),
        "unknown TFDS": (config("data.source", "tfds:dogs"), r"'tfds:dogs' is not a TFDS data set"),
        "TFDS of text": (
            config("data.source", "tfds:imdb_reviews"),
            r"'tfds:imdb_reviews' has no images, only text, label",
        ),
        "five channels of pictures": (
            data("small", "--config.data.channels=5"),
            r"data\.channels=5 goes with arrays, .*: give 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\)",
        ),
        "floats without a range": (data("floats.npy"), r"floats\.npy holds float64 \[4, 8, 8\] from 0 to 1: give the"),
        "channels first": (data("first.npy"), r"first\.npy holds .* looks like \[N, C, H, W\]: give array\.transpose"),
        "another number of channels": (
            data("floats.npy", "--config.data.range=(0,1)", "--config.data.channels=2"),
            r"floats\.npy holds .*, 1 channels, but config\.data\.channels=2: give 1",
        ),
        "values beyond the range": (
            data("floats.npy", "--config.data.range=(0,.5)"),
            r"image floats\.npy\[0\]: values from 0 to 1 are outside config\.data\.range=\(0, 0\.5\)",
        ),
        "a split of an array": (
            data("floats.npy", "--config.data.range=(0,1)", "--config.data.split=test"),
            r"data\.split='test': an array has only 'train'",
        ),
        "cut array": (data("cut.npy"), r"cut\.npy cannot be read \(.*\): write it again"),
        "an npz of other names": (
            data("names.npz"),
            r"names\.npz cannot be read \(it has x, but neither images nor arr",
        ),
        "no Parquet": (data("text.parquet"), r"text\.parquet cannot be read \(.*\): download it again"),
        "no cache folder": (
            data("small", f"--config.data.cache_dir={files / 'text.txt'}"),
            r"cache_dir: .*cannot be written",
        ),
    }


def _workdir_cases(command, run, files):
    return {
        "another model": (
            [command, f"--workdir={run}"],
            r"holds another run \(config\.model\.attention_resolutions: ",
        ),
        "config.json is cut": ([command, f"--workdir={files / 'cut-config'}"], r"config\.json is not a JSON object"),
        "config.json is a list": (
            [command, f"--workdir={files / 'a-list'}"],
            r"config\.json is not a JSON object",
        ),
        "config.json is empty": (
            [command, f"--workdir={files / 'no-section'}"],
            r"lacks config\.data, config\.mo",
        ),
        "config.json lacks a key": (
            [command, f"--workdir={files / 'no-key'}"],
            r"lacks config\.model\.channels: ",
        ),
        "a folder that Orbax misreads": (
            ["--config=tiny", f"--workdir={files / 't_[br]'}"],
            r"has \[ in its path",
        ),
        "all checkpoints damaged": (
            ["--mode=sample", f"--workdir={files / 'damaged'}"],
            r"none of the checkpoints in .* can be read",
        ),
        "no checkpoint yet": (["--mode=sample", f"--workdir={files / 'no-checkpoint'}"], r"holds no checkpoint yet"),
        "nothing to sample": (["--mode=sample", f"--workdir={files / 'empty'}"], r"holds no run"),
        "no such format": (["--mode=sample", f"--workdir={run}", "--out=x.gif"], r"--out=x\.gif must end in \.png"),
        "no folder": (["--mode=sample", f"--workdir={files / 'nowhere'}"], r"nowhere does not exist: give the workdir"),
        "nothing to evaluate": (["--mode=evaluate", f"--workdir={files / 'empty'}"], r"holds no run"),
        "no report": (["--mode=report", f"--workdir={files / 'empty'}"], r"holds no run"),
        "no such split": (
            ["--mode=evaluate", f"--workdir={run}", "--splits=test"],
            r"split='test': the digits have only 'train'",
        ),
        "labels without classes": (
            ["--mode=evaluate", f"--workdir={run}", "--labels=none"],
            r"--labels=none: the run has no classes: leave it out",
        ),
        "no samples to evaluate": (
            ["--mode=evaluate", f"--workdir={run}", f"--samples={files / 'text.txt'}"],
            r"--samples=.*text\.txt holds no samples",
        ),
        "no Inception": (
            ["--mode=evaluate", f"--workdir={run}", f"--inception={files / 'text.txt'}"],
            r"text\.txt holds no Inception weights",
        ),
        "a picture of samples": (
            ["--mode=evaluate", f"--workdir={run}", f"--samples={files / 'small' / 'small.png'}"],
            r"small\.png holds no samples \(it is a picture, \.png\): give an \.npz .*--out=samples\.npz",
        ),
        "no such step": (
            ["--mode=sample", f"--workdir={run}", "--step=4"],
            r"--step=4: there is no such checkpoint; .* has those of steps ",
        ),
        "no such show": (["--mode=sample", f"--workdir={run}", "--show=dance"], r"--show=dance"),
        "a show's ending": (
            ["--mode=sample", f"--workdir={run}", "--show=animation", "--out=x.png"],
            r"--out=x\.png must end in \.gif or \.webp",
        ),
        "no samples": (["--mode=sample", f"--workdir={run}", "--num=0"], r"--num=0 must be an integer in 1\.\."),
    }


def _write_files(files, run):
    """Writes the files that the cases need."""
    for name in (
        "empty",
        "cut",
        "bomb",
        "small",
        "cut-config",
        "no-checkpoint",
        "a-list",
        "no-section",
        "no-key",
    ):
        (files / name).mkdir(parents=True)
    (files / "broken.py").write_text("def get_config(:\n")
    (files / "text.txt").write_text("nothing to train on\n")
    Image.new("RGB", (16, 16)).save(files / "small" / "small.png")
    (files / "cut" / "cut.png").write_bytes((files / "small" / "small.png").read_bytes()[:40])
    Image.new("1", (8000, 8000)).save(files / "bomb" / "bomb.png")
    with zipfile.ZipFile(files / "cut.zip", "w") as archive:
        archive.write(files / "small" / "small.png", "small.png")
    np.save(files / "floats.npy", np.linspace([0] * 4, 1, 64).T.reshape(4, 8, 8))
    np.save(files / "first.npy", np.zeros((2, 3, 8, 8), np.uint8))
    (files / "cut.npy").write_bytes((files / "floats.npy").read_bytes()[:-8])
    np.savez(files / "names.npz", x=np.zeros((2, 8, 8), np.uint8))
    shutil.copy(files / "text.txt", files / "text.parquet")
    (files / "cut.zip").write_bytes((files / "cut.zip").read_bytes()[:-30])
    (files / "labels-idx1-ubyte").write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, 1) + bytes(1))
    whole = gzip.compress(struct.pack(">4B3i", 0, 0, 8, 3, 9, 28, 28) + bytes(9 * 28 * 28))
    (files / "cut-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    config = json.loads((run / "config.json").read_text())
    (files / "cut-config" / "config.json").write_text(json.dumps(config)[:99])
    (files / "a-list" / "config.json").write_text("[]")
    (files / "no-section" / "config.json").write_text("{}")
    del config["model"]["channels"]
    (files / "no-key" / "config.json").write_text(json.dumps(config))
    shutil.copy(run / "config.json", files / "no-checkpoint")
    shutil.copytree(run, files / "damaged")
    for file in (files / "damaged" / "checkpoints").rglob("manifest.ocdbt"):
        file.write_bytes(b"")


NAMES = sorted(_cases(pathlib.Path("folder"), pathlib.Path("run")))
