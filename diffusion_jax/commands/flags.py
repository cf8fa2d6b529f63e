"""The flags of the command line, and their values."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import config as configs

_SHOWS = ("interpolation", "progressive", "variations", "inpainting", "reconstruction", "animation")
FLAGS: dict[str, tuple[Any, Any, str]] = {  # name: (its definition or values, default, help)
    "help": (flags.DEFINE_bool, False, "show the flags of the mode"),
    "debug": (flags.DEFINE_bool, False, "show the traceback of an error"),
    "workdir": (flags.DEFINE_string, None, "the folder of the run: config, checkpoints, metrics, samples"),
    "profile": (flags.DEFINE_integer, 0, "number of steps to trace, after the first ten, for xprof; prints a summary"),
    "num": (flags.DEFINE_integer, None, "number of images to sample (default 64) or evaluate (all); rows of a figure"),
    "seed": (flags.DEFINE_integer, 0, "seed of the samples or of the evaluation"),
    "step": (flags.DEFINE_integer, None, "step of the checkpoint; default: the last"),
    "ema": (flags.DEFINE_float, None, "relative length of another average, e.g. 0.1; for train.snapshot_every"),
    "out": (flags.DEFINE_string, None, "file or folder to write"),
    "sampler": (configs.CHOICES["sampling.sampler"], None, "sampler; default: the config's"),
    "steps": (flags.DEFINE_integer, None, "steps of the sampler; default: the config's"),
    "eta": (flags.DEFINE_float, None, "noise of ddim and dpmpp_2m, from 0 to 1; default: the config's"),
    "sigma": (configs.CHOICES["sampling.sigma"], None, "deviation of the reverse steps; default: the config's"),
    "grid": (configs.CHOICES["sampling.grid"], None, "the steps of ddim and dpmpp_2m; default: the config's"),
    "guidance": (flags.DEFINE_float, None, "weight of classifier-free guidance; default: the config's"),
    "labels": (
        flags.DEFINE_list,
        [],
        "classes to draw, by name or number; default: all in turn; evaluate: none adds p(x | ∅)",
    ),
    "show": (_SHOWS, None, "the figure to draw"),
    "images": (flags.DEFINE_string, "", "folder or zip of images to edit; default: the run's images"),
    "quick": (flags.DEFINE_bool, False, "measure 256 images and 25 steps t of each, in minutes on a CPU"),
    "splits": (flags.DEFINE_list, [], "splits to evaluate; default: data.split and data.test_split"),
    "samples": (flags.DEFINE_string, "", "samples that --mode=sample wrote, to measure too"),
    "inception": (flags.DEFINE_string, "", "weights of Inception v3 (tools.convert_inception)"),
    "reference": (flags.DEFINE_string, "", "statistics-….npz of another evaluation"),
    "format": (("jax", "diffusers", "svg", "png"), None, "export: jax or diffusers; report: charts as svg or png"),
    "from": (
        flags.DEFINE_string,
        "",
        "a folder of diffusers, a .safetensors file or a repository, or an exported sampler",
    ),
    "topology": (flags.DEFINE_string, "", "a TPU and its shape, e.g. v5e:2x4, or cpu or gpu; several with commas"),
    "prices": (
        flags.DEFINE_string,
        "",
        "a TOML file with the prices of chips; default: the dated ones that are shipped",
    ),
    "search": (flags.DEFINE_bool, True, "look for the largest batch that fits, after the table"),
    "platform": (("", "tpu", "gpu", "cpu"), "", "where to compute; default: the best"),
    "coordinator": (flags.DEFINE_string, "", "host:port of process 0; Cloud TPU pods and Slurm know it"),
    "num_processes": (flags.DEFINE_integer, 1, "number of processes, with --coordinator"),
    "process_id": (flags.DEFINE_integer, 0, "number of this process, with --coordinator"),
}
_MEANT = {"num_samples": "num", "n": "num", "output": "out", "checkpoint": "step", "data": "config.data.path"}
_RANGES = {"num": (1, 2**32), "seed": (0, 2**32 - 1), "num_processes": (1, 2**31 - 1), "process_id": (0, 2**31 - 2)}
_RANGES |= {"step": (0, 2**31 - 1), "profile": (1, 10_000)}


def parse(argv: Sequence[str], modes: Sequence[str]) -> flags.FlagValues:
    """Parses the command line; refuses unknown flags, config keys and config files by their names.

    Args:
      modes: values of --mode.
    """
    argv = [_with_figure(_with_files(arg), rest, argv) for arg, *rest in (argv[i:] for i in range(len(argv)))]
    given, kinds = [], configs.defaults()
    for arg in argv:
        if arg.lstrip("-").startswith("config."):
            configs.check_key(key := arg.lstrip("-").removeprefix("config.").split("=")[0])
            given.append(key)
            if given.count(key) > 1 and isinstance(kinds[key], tuple):  # ml_collections appends the second
                raise UserError(f"--config.{key} is given {given.count(key)} times: give it once")
            if not any(re.match("--?config(=|$)", other) for other in argv):
                _refuse_key(arg)
    args = flags.FlagValues()
    _define(args, argv, modes)
    try:
        rest = args(argv)
        if args.config is not None:
            args.config.keys()  # a missing config file raises only when it is used
    except flags.UnrecognizedFlagError as error:
        if error.flagname in _MEANT:
            raise UserError(f"--{error.flagname} is no flag: give --{_MEANT[error.flagname]}") from None
        raise UserError(one_line(error)) from error
    except flags.Error as error:
        *traceback, last = str(error).splitlines() or [""]
        if any("Traceback" in line for line in traceback):  # of a config file, which raised a ValueError
            raise UserError(f"--config: {last.partition(': ')[2] or last}") from error
        raise UserError(_without_python(one_line(error))) from error
    except Exception as error:  # a config file is the user's program and may raise anything
        raise UserError(f"--config: {one_line(error)}") from error
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is not a flag: flags start with --")
    return args


def _refuse_key(arg: str) -> None:
    """Raises UserError for a key of a config without a config; names the flag for the same value if there is one."""
    flag, _, value = arg.lstrip("-").removeprefix("config.sampling.").partition("=")
    instead = f"; to draw from a run in --workdir give --{flag}={value}" if flag in FLAGS else ""
    raise UserError(
        f"{arg} needs --config too: give --config=own, another one of {', '.join(configs.shipped())}, or a file"
        + (instead or "; a mode that reads config.json in --workdir takes neither, but flags of its own, see --help")
    )


def _with_figure(arg: str, rest: Sequence[str], argv: Sequence[str]) -> str:
    """Returns the argument; a bare --show gets a figure if help is asked for.

    Raises:
      UserError: a bare --show draws nothing.
    """
    if arg not in ("-show", "--show") or (rest and not rest[0].startswith("-")):
        return arg
    if {"-help", "--help"} & {*argv}:
        return f"--show={_SHOWS[0]}"
    raise UserError(f"--show needs a figure: give --show= with one of {', '.join(_SHOWS)}")


def _with_files(arg: str) -> str:
    """Replaces "~" at the start of a value by the home directory, and the name of a shipped config by its file."""
    flag, equals, value = arg.partition("=")
    arg = f"{flag}={os.path.expanduser(value)}" if equals else os.path.expanduser(arg)
    match = re.fullmatch(r"(--?config=)([\w-]+)(:\w+)?", arg)
    if not match:
        return arg
    if match[2] not in (shipped := configs.shipped()):
        nearest = difflib.get_close_matches(match[2], shipped, n=1)
        meant = f"did you mean {nearest[0]}? There are" if nearest else "give one of"
        raise UserError(f"--config={match[2]} is not a shipped config: {meant} {', '.join(shipped)}, or a file")
    return match[1] + str(shipped[match[2]]) + (match[3] or "")


def _without_python(text: str) -> str:
    """Puts the words of a user in place of Python's for a value of another type."""
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not an integer", text)
    return re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)


def help_text(name: str, modes: dict[str, Any], always: Sequence[str], args: flags.FlagValues) -> str:
    """Returns the purpose, an example and the flags of a mode; `always` are the flags of all modes."""
    mode = modes[name]
    program = "python main.py" if sys.argv[0].endswith("main.py") else "diffusion_jax"
    lines = [f"--mode={name}: {mode.purpose}", "", f"    {program} {mode.example}", ""]
    for title, names in (("Needs", mode.needs), ("Takes", mode.takes), ("Always", always)):
        lines += [f"{title}:", *(f"    --{flag:<14} {args[flag].help}" for flag in names), ""] if names else []
    if "config" in (*mode.needs, *mode.takes):
        lines += ["Shipped configs: " + ", ".join(configs.shipped()) + "; any key: --config.train.num_steps=200", ""]
    lines += ["Modes: " + ", ".join(modes) + "; each has its own --help."]
    return "\n".join(lines)


def common(args: flags.FlagValues) -> dict[str, Any]:
    """Returns the flags and the config's keys that all processes of a command have in common."""
    shared = [flag for flag in ("mode", *FLAGS) if flag not in ("process_id", "debug")]
    config = {} if args.config is None else configs.flatten(args.config)
    return {f"--{flag}": args[flag].value for flag in shared} | config


def check_ranges(args: flags.FlagValues) -> None:
    """Raises UserError for an integer outside its range."""
    for flag, (low, high) in _RANGES.items():
        if args[flag].present:
            configs.check_integer(f"--{flag}", args[flag].value, low, high)


def _define(values: flags.FlagValues, argv: list[str], modes: Sequence[str]) -> None:
    """Defines every flag in `values`; the overrides of the config's keys are read from `argv`."""
    flags.DEFINE_enum("mode", "train", modes, "what to do", flag_values=values)
    about = "a shipped config, e.g. digits, or a file"
    config_flags.DEFINE_config_file("config", None, about, flag_values=values, sys_argv=argv)
    for name, (kind, value, text) in FLAGS.items():
        if isinstance(kind, tuple):
            flags.DEFINE_enum(name, value, kind, text, flag_values=values)
        else:
            kind(name, value, text, flag_values=values)
