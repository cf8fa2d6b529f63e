"""The command line.

python main.py --config=configs/digits.py --workdir=runs/digits
python main.py --mode=prepare --config=configs/celeba.py   (the images alone: needs no accelerator)
python main.py --mode=sample --workdir=runs/digits --num=64 --seed=0 --out=samples.png
python main.py --mode=sample --workdir=runs/digits --show=interpolation
python main.py --mode=evaluate --workdir=runs/digits --samples=samples.npz
python main.py --mode=report --workdir=runs/digits   (--format=svg or png: the charts as files too)
python main.py --mode=audit --config=configs/celeba.py   (departures from Ho et al.)
python main.py --mode=plan --config=configs/cifar10.py --topology=v5e:2x4   (needs no TPU, but libtpu)
python main.py --mode=export --workdir=runs/digits --out=sampler.npz
python main.py --mode=export --format=diffusers --workdir=runs/digits --out=folder
python main.py --mode=import --from=google/ddpm-celebahq-256 --workdir=runs/celebahq256
"""

import logging as stdlib_logging
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from configs import default
from diffusion_jax import from_config, hosts
from diffusion_jax.errors import UserError, one_line

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, see configs/ (to train or to prepare)")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: config, checkpoints, metrics, samples")
NUM = flags.DEFINE_integer("num", None, "images to sample, default 64; rows of a --show")
SEED = flags.DEFINE_integer("seed", 0, "of the samples")
SAMPLER = flags.DEFINE_enum("sampler", None, ["ancestral", "ddim", "dpmpp_2m"], "default: the config's")
STEPS = flags.DEFINE_integer("steps", None, "of the sampler; default: the config's")
ETA = flags.DEFINE_float("eta", None, "noise of ddim; default: the config's")
SHOW = flags.DEFINE_enum(
    "show",
    None,
    ["interpolation", "progressive", "variations", "inpainting", "animation"],
    "with --mode=sample: a picture of what the model can do",
)
IMAGES = flags.DEFINE_string("images", "", "of --show=interpolation or inpainting: a folder or zip; default: the run's")
SPLITS = flags.DEFINE_list("splits", [], "to evaluate; default: config.data.split and config.data.test_split")
SAMPLES = flags.DEFINE_string("samples", "", "of --mode=evaluate: what --mode=sample has written, to be judged too")
INCEPTION = flags.DEFINE_string(
    "inception", "", "of --mode=evaluate: weights of Inception v3 (tools.convert_inception)"
)
REFERENCE = flags.DEFINE_string("reference", "", "of --mode=evaluate: statistics-….npz of another evaluation")
OUT = flags.DEFINE_string(
    "out",
    None,
    "where the samples go: .png (a grid), .npz (an array) or folder/ (arrays); of --mode=export: .npz",
)
FORMAT = flags.DEFINE_enum(
    "format",
    "jax",
    ["jax", "diffusers", "svg", "png"],
    "of --mode=export: jax, one file, or diffusers, a folder; of --mode=report: svg or png, the charts as files too",
)
FROM = flags.DEFINE_string("from", "", "of --mode=import: diffusers' folder, .safetensors file or repository")
TOPOLOGY = flags.DEFINE_string("topology", "", "of --mode=plan: a TPU and its shape, e.g. v5e:2x4, or cpu or gpu")
SEARCH = flags.DEFINE_bool("search", True, "of --mode=plan: look for the largest batch that fits, after the table")
PLATFORM = flags.DEFINE_enum("platform", "", ["", "tpu", "gpu", "cpu"], "where to compute; default: the best there is")
COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0; Cloud TPU pods and Slurm know it")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "with --coordinator: how many processes")
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "with --coordinator: which of them this is")
DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of an error")


# Each mode imports what it needs: a start without SciPy, scikit-learn and the like takes half the time.


def _train():
    from diffusion_jax.train import train

    train(CONFIG.value, WORKDIR.value)


def _prepare():
    from diffusion_jax.prepare import prepare

    prepare(CONFIG.value)


def _sample():
    from diffusion_jax.sample import sample

    if SHOW.value:
        _show()
        return
    sample(WORKDIR.value, 64 if NUM.value is None else NUM.value, SEED.value, OUT.value or "samples.png", **_how())


def _show():
    from diffusion_jax.show import show

    _refuse_how("--show, which takes all steps of the ancestral sampler")
    out = OUT.value or f"{SHOW.value}.{'gif' if SHOW.value == 'animation' else 'png'}"
    show(WORKDIR.value, SHOW.value, SEED.value, out, NUM.value, IMAGES.value)


def _export():
    if FORMAT.value == "diffusers":
        from diffusion_jax.pretrained import export_diffusers

        _refuse_how("--format=diffusers, whose pipeline has a sampler of its own")
        export_diffusers(WORKDIR.value, OUT.value or "diffusers")
        return
    if FORMAT.value != "jax":
        raise UserError(f"--format={FORMAT.value} does not go with --mode=export: give jax or diffusers")
    from diffusion_jax.sample import export_sampler

    export_sampler(WORKDIR.value, OUT.value or "sampler.npz", **_how())


def _import():
    from diffusion_jax.pretrained import import_diffusers

    if not FROM.value:
        raise UserError("--from is missing: give a folder of diffusers, a .safetensors file, or a repository's name")
    reference = CONFIG.value
    if reference is None:
        reference = default.get_config()
        reference.model.dropout = 0.0  # which is training's, and none is meant yet
    import_diffusers(FROM.value, WORKDIR.value, reference)


def _evaluate():
    from diffusion_jax.evaluate import evaluate

    what = {"samples": SAMPLES.value, "inception_path": INCEPTION.value, "reference": REFERENCE.value}
    evaluate(WORKDIR.value, seed=SEED.value, num=NUM.value, splits=tuple(SPLITS.value), **what)


def _report():
    from diffusion_jax.report import report

    report(WORKDIR.value, OUT.value, FORMAT.value if FORMAT.present else None)


def _plan():
    from diffusion_jax.plan import plan

    if not TOPOLOGY.value:
        raise UserError("--topology is missing: give a TPU and its shape, e.g. v5e:2x4, or cpu or gpu")
    plan(CONFIG.value, TOPOLOGY.value, OUT.value, SEARCH.value)


def _audit():
    from diffusion_jax.audit import audit

    audit(CONFIG.value, OUT.value)


def _how():
    return {"sampler": SAMPLER.value, "steps": STEPS.value, "eta": ETA.value}


def _refuse_how(what):
    if given := [f"--{name}" for name, value in _how().items() if value is not None]:
        raise UserError(f"{given[0]} does not go with {what}: leave it out")


_MODES = {
    "train": _train,
    "prepare": _prepare,
    "sample": _sample,
    "export": _export,
    "import": _import,
    "evaluate": _evaluate,
    "report": _report,
    "audit": _audit,
    "plan": _plan,
}
MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "what to do")


def parse(argv: list[str]) -> list[str]:
    """Flags of the command line, with a key that is in no config refused under its own name."""
    for arg in argv:
        if arg.lstrip("-").startswith("config."):
            from_config.check_key(arg.lstrip("-").removeprefix("config.").split("=")[0], default.get_config())
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(one_line(error)) from error
    try:
        if CONFIG.value is not None:
            CONFIG.value.keys()  # a config file that cannot be loaded says so only when it is used
        return rest
    except Exception as error:  # whatever the config file, which is the user's program, raises
        raise UserError(f"--config: {one_line(error)}") from error


def run(argv: list[str]) -> None:
    """Does what the flags say."""
    if not DEBUG.value:
        _silence_libraries()
    if argv[1:]:
        raise UserError(f"{argv[1]!r} is no flag: flags start with --")
    mode = MODE.value
    if WORKDIR.value is None and mode not in ("prepare", "audit", "plan"):
        raise UserError("--workdir is missing: give the folder of the run")
    if CONFIG.value is None and mode in ("train", "prepare", "audit", "plan"):
        raise UserError("--config is missing: give a config file, e.g. --config=configs/digits.py")
    if CONFIG.value is not None and mode not in ("train", "prepare", "audit", "plan", "import"):
        raise UserError(
            f"--config does not go with --mode={mode}, which takes that of the run (config.json in --workdir): leave "
            "it out"
        )
    if CONFIG.value is not None:
        from_config.check(CONFIG.value, default.get_config())
    if mode not in ("prepare", "audit", "plan", "report"):  # which need no device
        hosts.initialize(PLATFORM.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    _MODES[mode]()


def _silence_libraries():
    """What the user can act on comes as one error of our own; a full disk makes Orbax's threads print 1,600 lines."""
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)

    def hook(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):  # of saves that have failed already
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def main() -> None:
    """Runs, and turns what the user can mend into one line and exit code 1."""
    try:
        app.run(run, flags_parser=parse)
    except hosts.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (UserError, FloatingPointError, OSError, jax.errors.JaxRuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
