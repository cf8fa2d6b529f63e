"""The command line: one table of modes, and the errors that end a command as one line.

diffusion_jax --config=celeba --workdir=runs/celeba
diffusion_jax --mode=sample --workdir=runs/celeba --num=64 --out=samples.png
diffusion_jax --mode=sample --help
"""

import logging as stdlib_logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags, logging
from ml_collections import config_flags

from diffusion_jax.configs import default
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import config as configs
from diffusion_jax.running import hosts

# ---------------------------------------------------------------- what the modes run
# Each mode imports what it needs: a start without SciPy, scikit-learn and the like takes half the time.


def _train(given):
    from diffusion_jax.train import train

    train(given.config, given.workdir)


def _prepare(given):
    from diffusion_jax.train import prepare

    prepare(given.config)


def _sample(given):
    from diffusion_jax.interop.samples import write_samples

    settings = {name: given[name].value for name in _SAMPLER}
    write_samples(given.workdir, given.num or 64, given.seed, given.out or "samples.png", **settings)


def _show(given):
    from diffusion_jax.pictures.shows import show

    out = given.out or f"{given.show}.{'gif' if given.show == 'animation' else 'png'}"
    show(given.workdir, given.show, given.seed, out, given.num, given.images)


def _export(given):
    from diffusion_jax.interop.export import export_sampler

    if given.format not in (None, "jax"):
        raise UserError(f"--format={given.format} does not go with --mode=export: give jax or diffusers")
    settings = {name: given[name].value for name in _SAMPLER}
    export_sampler(given.workdir, given.out or "sampler.npz", **settings)


def _export_diffusers(given):
    from diffusion_jax.interop.diffusers import export_diffusers

    export_diffusers(given.workdir, given.out or "diffusers")


def _import(given):
    from diffusion_jax.interop.diffusers import import_diffusers

    reference = given.config
    if reference is None:
        reference = default.get_config()
        reference.model.dropout = 0.0  # dropout belongs to a training, which is not planned yet
    import_diffusers(given["from"].value, given.workdir, reference)


def _evaluate(given):
    from diffusion_jax.evaluation.evaluate import evaluate

    evaluate(
        given.workdir,
        seed=given.seed,
        num=given.num,
        splits=tuple(given.splits),
        samples=given.samples,
        inception_path=given.inception,
        reference=given.reference,
    )


def _report(given):
    from diffusion_jax.evaluation.report import report

    report(given.workdir, given.out, given.format)


def _plan(given):
    from diffusion_jax.planning.plan import plan

    plan(given.config, given.topology, given.out, given.search)


def _audit(given):
    from diffusion_jax.planning.audit import audit

    audit(given.config, given.out)


# ---------------------------------------------------------------- the table


class Mode(NamedTuple):
    """A row of the table of modes."""

    run: Callable  # takes the flags
    purpose: str
    needs: tuple[str, ...]  # flags that must be given
    takes: tuple[str, ...]  # flags that may be given
    example: str
    on_device: bool = True  # False: it computes on no accelerator and joins no other process


_SAMPLER = ("sampler", "steps", "eta")
MODES = {
    "train": Mode(
        _train,
        "Trains, or resumes, the run in a workdir.",
        *(("config", "workdir"), ()),
        "--config=celeba --workdir=runs/celeba --config.data.path=img_align_celeba.zip",
    ),
    "prepare": Mode(
        _prepare,
        "Decodes the images of a config into their cache; needs no accelerator.",
        *(("config",), ()),
        "--mode=prepare --config=celeba --config.data.path=img_align_celeba.zip",
        on_device=False,
    ),
    "sample": Mode(
        _sample,
        "Writes samples of the last checkpoint: a grid (.png), an array (.npz) or shards (folder/).",
        *(("workdir",), ("num", "seed", "out", *_SAMPLER)),
        "--mode=sample --workdir=runs/digits --num=64 --seed=0 --out=samples.png",
    ),
    "sample --show": Mode(
        _show,
        "Draws a figure of what the model can do, with all steps of the ancestral sampler.",
        *(("workdir", "show"), ("num", "seed", "out", "images")),
        "--mode=sample --workdir=runs/digits --show=interpolation",
    ),
    "evaluate": Mode(
        _evaluate,
        "Measures bits/dim, and the quality of samples, of the last checkpoint.",
        *(("workdir",), ("num", "seed", "splits", "samples", "inception", "reference")),
        "--mode=evaluate --workdir=runs/digits --samples=samples.npz",
    ),
    "report": Mode(
        _report,
        "Writes one HTML page about a run; reads no checkpoint.",
        *(("workdir",), ("out", "format")),
        "--mode=report --workdir=runs/digits",
        on_device=False,
    ),
    "export": Mode(
        _export,
        "Writes the sampler as one file that JAX and NumPy open.",
        *(("workdir",), ("out", "format", *_SAMPLER)),
        "--mode=export --workdir=runs/digits --out=sampler.npz",
    ),
    "export --format=diffusers": Mode(
        _export_diffusers,
        "Writes a folder for diffusers' DDPMPipeline, which has a sampler of its own.",
        *(("workdir", "format"), ("out",)),
        "--mode=export --format=diffusers --workdir=runs/digits --out=digits-diffusers",
    ),
    "import": Mode(
        _import,
        "Makes a workdir of a diffusers model.",
        *(("workdir", "from"), ("config",)),
        "--mode=import --from=google/ddpm-celebahq-256 --config=celebahq256 --workdir=runs/hub",
    ),
    "plan": Mode(
        _plan,
        "Compiles a run for a TPU that is not there; tells memory, FLOPs and hours. Needs libtpu.",
        *(("config", "topology"), ("out", "search")),
        "--mode=plan --config=cifar10 --topology=v5e:2x4",
        on_device=False,
    ),
    "audit": Mode(
        _audit,
        "Lists where a config departs from Ho et al.'s.",
        *(("config",), ("out",)),
        "--mode=audit --config=celeba",
        on_device=False,
    ),
}
# Every mode takes these; the last four only matter where it computes.
_ALWAYS = ("mode", "help", "debug", "platform", "coordinator", "num_processes", "process_id")
_MISSING = {
    "config": "give a config that ships, e.g. --config=digits, or a file",
    "workdir": "give the folder of the run",
    "from": "give a folder of diffusers, a .safetensors file, or a repository's name",
    "topology": "give a TPU and its shape, e.g. v5e:2x4, or cpu or gpu",
}


_SHOWS = ("interpolation", "progressive", "variations", "inpainting", "animation")
_FLAGS: dict[str, tuple[Any, Any, str]] = {  # name: (type or values, default, help)
    "mode": (tuple(sorted({name.split(" ")[0] for name in MODES})), "train", "what to do"),
    "help": (bool, False, "show the flags of the mode"),
    "debug": (bool, False, "show the traceback of an error"),
    "workdir": (str, None, "folder of the run: config, checkpoints, metrics, samples"),
    "num": (int, None, "images: to sample (64), to evaluate (all); rows of a figure"),
    "seed": (int, 0, "seed of the samples or of the evaluation"),
    "out": (str, None, "file or folder to write"),
    "sampler": (configs.CHOICES["sampling.sampler"], None, "default: the config's"),
    "steps": (int, None, "steps of the sampler; default: the config's"),
    "eta": (float, None, "noise of ddim; default: the config's"),
    "show": (_SHOWS, None, "the figure to draw"),
    "images": (str, "", "folder or zip to interpolate or inpaint; default: the run's images"),
    "splits": (list, [], "splits to evaluate; default: data.split and data.test_split"),
    "samples": (str, "", "samples that --mode=sample wrote, to be measured too"),
    "inception": (str, "", "weights of Inception v3 (tools.convert_inception)"),
    "reference": (str, "", "statistics-….npz of another evaluation"),
    "format": (("jax", "diffusers", "svg", "png"), None, "export: jax or diffusers; report: charts as svg or png"),
    "from": (str, "", "diffusers' folder, .safetensors file or repository"),
    "topology": (str, "", "a TPU and its shape, e.g. v5e:2x4, or cpu or gpu"),
    "search": (bool, True, "look for the largest batch that fits, after the table"),
    "platform": (("", "tpu", "gpu", "cpu"), "", "where to compute; default: the best"),
    "coordinator": (str, "", "host:port of process 0; Cloud TPU pods and Slurm know it"),
    "num_processes": (int, 1, "number of processes, with --coordinator"),
    "process_id": (int, 0, "number of this process, with --coordinator"),
}
_DEFINE: dict[type, Callable] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    list: flags.DEFINE_list,
}


def _define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines every flag in `values`; the overrides of the config's keys are read from `argv`."""
    text = "a config that ships (celeba) or a file"
    config_flags.DEFINE_config_file("config", None, text, flag_values=values, sys_argv=argv)
    for name, (kind, value, text) in _FLAGS.items():
        if isinstance(kind, tuple):
            flags.DEFINE_enum(name, value, kind, text, flag_values=values)
        else:
            _DEFINE[kind](name, value, text, flag_values=values)


# ---------------------------------------------------------------- from arguments to a mode


def _parse(argv: Sequence[str]) -> flags.FlagValues:
    """Parses the command line; refuses unknown flags, config keys and config files by their names."""
    argv = [_with_config_file(arg) for arg in argv]
    for arg in argv:
        if arg.lstrip("-").startswith("config."):
            configs.check_key(arg.lstrip("-").removeprefix("config.").split("=")[0])
    given = flags.FlagValues()
    _define(given, argv)
    try:
        rest = given(argv)
        if given.config is not None:
            given.config.keys()  # a config file that is not there raises only when it is used
    except flags.Error as error:
        raise UserError(one_line(error)) from error
    except Exception as error:  # a config file is the user's program and raises anything
        raise UserError(f"--config: {one_line(error)}") from error
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is no flag: flags start with --")
    return given


def _with_config_file(arg: str) -> str:
    """Replaces the name of a config that ships by its file: --config=celeba."""
    match = re.fullmatch(r"(--?config=)([\w-]+)", arg)
    if not match:
        return arg
    if match[2] not in (shipped := configs.shipped()):
        raise UserError(f"--config={match[2]} does not ship: give one of {', '.join(shipped)}, or a file")
    return match[1] + str(shipped[match[2]])


def _mode_of(given: flags.FlagValues) -> str:
    """Returns the row of MODES: --show and --format choose between the rows of a mode."""
    if given.mode == "sample" and given.show:
        return "sample --show"
    if given.mode == "export" and given.format == "diffusers":
        return "export --format=diffusers"
    return given.mode


def _check_flags(name: str, mode: Mode, given: flags.FlagValues) -> None:
    """Raises UserError for a flag that the mode needs and lacks, or does not take."""
    takes = {*mode.needs, *mode.takes, *_ALWAYS}
    for flag in given:
        if given[flag].present and flag.split(".")[0] not in takes:
            why = ", which takes the one of the run (config.json in --workdir)" if flag == "config" else ""
            raise UserError(f"--{flag} does not go with --mode={name}{why}: leave it out")
    for flag in mode.needs:
        if given[flag].value in (None, ""):
            raise UserError(f"--{flag} is missing: {_MISSING[flag]}")
    if given.num is not None and given.num < 1:
        raise UserError(f"--num={given.num} must be at least 1")


def _help(name: str, mode: Mode, given: flags.FlagValues) -> str:
    """Returns the purpose, an example and the flags of a mode."""
    command = "diffusion_jax"
    lines = [f"--mode={name}: {mode.purpose}", "", f"    {command} {mode.example}", ""]
    for title, names in (("Needs", mode.needs), ("Takes", mode.takes), ("Always", _ALWAYS)):
        lines += [f"{title}:", *(f"    --{flag:<14} {given[flag].help}" for flag in names), ""] if names else []
    if "config" in (*mode.needs, *mode.takes):
        lines += ["Configs that ship: " + ", ".join(configs.shipped()) + "; any key: --config.train.num_steps=200", ""]
    lines += ["Modes: " + ", ".join(MODES) + "; each has its own --help."]
    return "\n".join(lines)


def run(argv: Sequence[str]) -> None:
    """Does what the command line says.

    Raises:
      UserError: the command cannot be run; the message is one line with the flag and the mend.
    """
    given = _parse(argv)
    name = _mode_of(given)
    mode = MODES[name]
    if given.help:
        print(_help(name, mode, given))
        return
    _check_flags(name, mode, given)
    if given.config is not None:
        configs.check(given.config)
    if not given.debug:
        _silence_libraries()
    if mode.on_device:
        hosts.initialize(given.platform, given.coordinator, given.num_processes, given.process_id)
    mode.run(given)


def _silence_libraries() -> None:
    """Leaves errors to our one line; Orbax's threads print 1,600 lines for a full disk."""
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)

    def hook(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):  # from saves that have failed already
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; errors that the user can mend become one line on stderr."""
    argv = sys.argv if argv is None else argv
    try:
        run(argv)
    except hosts.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except (UserError, FloatingPointError, OSError, jax.errors.JaxRuntimeError) as error:
        if "--debug" in argv:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
