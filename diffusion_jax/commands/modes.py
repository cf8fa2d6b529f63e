"""The modes of the command line: what each runs, needs and takes."""

from collections.abc import Callable
from typing import NamedTuple

# ---------------------------------------------------------------- what the modes run
# Each mode imports what it needs: without SciPy, scikit-learn and the like a start takes half the time.


def _train(args):
    from diffusion_jax.train import train

    train(args.config, args.workdir, profile=args.profile)


def _prepare(args):
    from diffusion_jax.planning.prepare import prepare

    prepare(args.config, args.out or "prepared.png")


def _sample(args):
    from diffusion_jax.interop.samples import write_samples

    settings = {name: args[name].value for name in ("labels", "step", "ema", *_SAMPLER)}
    write_samples(args.workdir, args.num or 64, args.seed, args.out or "samples.png", **settings)


def _show(args):
    from diffusion_jax.pictures.shows import show

    out = args.out or f"{args.show}.{'gif' if args.show == 'animation' else 'png'}"
    show(
        args.workdir, args.show, args.seed, out, args.num, args.images, args.labels, args.guidance, args.step, args.ema
    )


def _export(args):
    from diffusion_jax.interop.export import write_sampler

    settings = {name: args[name].value for name in ("format", "step", "ema", *_SAMPLER)}
    write_sampler(args.workdir, args["from"].value, args.out or "sampler.npz", **settings)


def _export_diffusers(args):
    from diffusion_jax.interop.diffusers import export_diffusers

    export_diffusers(args.workdir, args.out or "diffusers", args.step, args.ema)


def _import(args):
    from diffusion_jax.interop.diffusers import import_diffusers

    import_diffusers(args["from"].value, args.workdir, args.config)


def _evaluate(args):
    from diffusion_jax.evaluation.evaluate import evaluate

    of_samples = {"samples": args.samples, "inception_path": args.inception, "reference": args.reference}
    asked = {"splits": tuple(args.splits), "labels": tuple(args.labels), "sigma": args.sigma, "ema": args.ema}
    evaluate(args.workdir, seed=args.seed, num=args.num, step=args.step, quick=args.quick, **asked, **of_samples)


def _tune(args):
    from diffusion_jax.evaluation.tune import tune

    tune(args.workdir, num=args.num or 1024, seed=args.seed, step=args.step)


def _report(args):
    from diffusion_jax.evaluation.report import report

    report(args.workdir, args.out, args.format)


def _plan(args):
    from diffusion_jax.planning.plan import plan

    plan(args.config, args.topology, args.out, args.search, args.prices)


def _audit(args):
    from diffusion_jax.planning.audit import audit

    audit(args.config, args.out)


# ---------------------------------------------------------------- the table


class Mode(NamedTuple):
    """A mode of the command line."""

    run: Callable  # takes the flags
    purpose: str
    example: str
    needs: tuple[str, ...]  # flags that must be given
    takes: tuple[str, ...] = ()  # flags that may be given
    on_device: bool = True  # False: uses no accelerator and joins no other process


_SAMPLER = ("sampler", "steps", "eta", "guidance", "sigma", "grid")
MODES = {
    "train": Mode(
        _train,
        "Trains, or resumes, the run in a workdir.",
        "--config=celeba --workdir=runs/celeba --config.data.path=img_align_celeba.zip",
        needs=("config", "workdir"),
        takes=("profile",),
    ),
    "prepare": Mode(
        _prepare,
        "Decodes the images of a config into their cache, and says what they are; needs no accelerator.",
        "--mode=prepare --config=celeba --config.data.path=img_align_celeba.zip",
        needs=("config",),
        takes=("out",),
        on_device=False,
    ),
    "sample": Mode(
        _sample,
        "Writes samples of the last checkpoint: a grid (.png), an array (.npz) or shards (folder/).",
        "--mode=sample --workdir=runs/digits --num=64 --seed=0 --out=samples.png",
        needs=("workdir",),
        takes=("num", "seed", "step", "ema", "out", "labels", *_SAMPLER, "show"),
    ),
    "sample --show": Mode(
        _show,
        "Draws a figure of what the model can do, with all steps of the ancestral sampler.",
        "--mode=sample --workdir=runs/digits --show=interpolation",
        needs=("workdir", "show"),
        takes=("num", "seed", "step", "ema", "out", "images", "labels", "guidance"),
    ),
    "evaluate": Mode(
        _evaluate,
        "Measures bits/dim of the last checkpoint, and the quality of samples.",
        "--mode=evaluate --workdir=runs/digits --samples=samples.npz",
        needs=("workdir",),
        takes=("num", "seed", "step", "ema", "quick", "splits", "labels", "samples", "inception", "reference", "sigma"),
    ),
    "tune": Mode(
        _tune,
        "Finds how few steps of which sampler are as good as all of them; resumes.",
        "--mode=tune --workdir=runs/digits",
        needs=("workdir",),
        takes=("num", "seed", "step"),
    ),
    "report": Mode(
        _report,
        "Writes one HTML page about a run; reads no checkpoint.",
        "--mode=report --workdir=runs/digits",
        needs=("workdir",),
        takes=("out", "format"),
        on_device=False,
    ),
    "export": Mode(
        _export,
        "Writes the sampler of a run, or of an older such file (--from), as one file that JAX and NumPy open.",
        "--mode=export --workdir=runs/digits --out=sampler.npz",
        needs=(),
        takes=("workdir", "from", "step", "ema", "out", "format", *_SAMPLER),
    ),
    "export --format=diffusers": Mode(
        _export_diffusers,
        "Writes a folder for diffusers' DDPMPipeline, which has a sampler of its own.",
        "--mode=export --format=diffusers --workdir=runs/digits --out=digits-diffusers",
        needs=("workdir", "format"),
        takes=("step", "ema", "out"),
    ),
    "import": Mode(
        _import,
        "Makes a workdir from a diffusers model.",
        "--mode=import --from=google/ddpm-celebahq-256 --config=celebahq256 --workdir=runs/hub",
        needs=("workdir", "from"),
        takes=("config",),
    ),
    "plan": Mode(
        _plan,
        "Compiles a run for absent TPUs; prints memory, FLOPs, hours and money. Needs libtpu.",
        "--mode=plan --config=cifar10 --topology=v5e:2x4,v6e:2x4",
        needs=("config", "topology"),
        takes=("out", "search", "prices"),
        on_device=False,
    ),
    "audit": Mode(
        _audit,
        "Lists where a config departs from Ho et al.'s.",
        "--mode=audit --config=celeba",
        needs=("config",),
        takes=("out",),
        on_device=False,
    ),
}
# Every mode takes these; the last four matter only to modes that use a device.
ALWAYS = ("mode", "help", "debug", "platform", "coordinator", "num_processes", "process_id")
