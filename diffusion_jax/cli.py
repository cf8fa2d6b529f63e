"""The command line: it runs a mode of `commands.modes`, and an error ends it with one line."""

import signal
import sys
from collections.abc import Sequence

import jax
from absl import flags

from diffusion_jax.commands import flags as cli_flags
from diffusion_jax.commands.modes import ALWAYS, MODES, Mode
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import config as configs
from diffusion_jax.running import hosts, watch


def _mode_of(args: flags.FlagValues) -> str:
    """Returns the key in MODES; --show and --format choose between the rows of a mode."""
    if args.mode == "sample" and args.show:
        return "sample --show"
    if args.mode == "export" and args.format == "diffusers":
        return "export --format=diffusers"
    return args.mode


def _check_flags(name: str, mode: Mode, args: flags.FlagValues) -> None:
    """Raises UserError for a missing flag, or one that the mode does not take."""
    takes = {*mode.needs, *mode.takes, *ALWAYS}
    for flag in args:
        if args[flag].present and flag.split(".")[0] not in takes:
            why = ", which reads config.json in --workdir" if flag == "config" else ""
            raise UserError(f"--{flag} does not go with --mode={name}{why}: leave it out")
    for flag in mode.needs:
        if args[flag].value in (None, ""):
            raise UserError(f"--{flag} is missing: give {args[flag].help}")
    cli_flags.check_ranges(args)


def run(argv: Sequence[str]) -> None:
    """Runs the mode that the command line chooses.

    Raises:
      UserError: the command cannot be run; the message is one line that names the flag and what to do.
    """
    args = cli_flags.parse(argv, sorted({name.split(" ")[0] for name in MODES}))
    name = _mode_of(args)
    mode = MODES[name]
    if args.help:
        print(cli_flags.help_text(name, MODES, ALWAYS, args))
        return
    _check_flags(name, mode, args)
    if args.config is not None:
        configs.check(args.config)
    if not args.debug:
        hosts.silence_libraries()
    if mode.on_device:
        hosts.initialize(args.platform, args.coordinator, args.num_processes, args.process_id)
        hosts.check_same(cli_flags.common(args))
    mode.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; an error of the user or the system is one line on stderr."""
    return watch.leave(_code(sys.argv if argv is None else argv))


def _code(argv):
    try:
        run(argv)
    except hosts.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except (UserError, FloatingPointError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
        if "--debug" in argv:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
