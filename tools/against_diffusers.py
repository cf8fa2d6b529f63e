"""Compares our networks and chains with those of diffusers, for docs/pretrained.md; prints a JSON line each.

    python -m tools.against_diffusers --torch=/path/to/python --workdir=runs/digits

diffusers runs in another interpreter, --torch, which has torch and diffusers; it does not need jax. The script
first compares networks of random weights in the published configurations, on inputs of unit variance and × 0.01,
and exports the imported tensors again. With --workdir (a run of configs/digits.py) it then compares the exported
run in diffusers' pipelines: with our noise injected, and by the Fréchet distance between --num images of each side.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from tools import pretrained_fixture

LOW = pretrained_fixture.LOW_CONTRAST
CIFAR10 = pretrained_fixture.UNET | {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBAHQ = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
# On the way down; diffusers' blocks change the number of channels there.
NO_BLOCKS = pretrained_fixture.UNET | {"layers_per_block": 0, "block_out_channels": [8, 8, 8]}
# name: (settings of the UNet2DModel, steps t with one image for each)
NETWORKS = {
    "fixture": (pretrained_fixture.UNET, (1, 500, 1000)),
    "no-blocks": (NO_BLOCKS, (1, 500, 1000)),
    "ddpm-cifar10-32": (CIFAR10, (1, 400, 1000)),
    "ddpm-celebahq-256": (CELEBAHQ, (400,)),
}


# ---------------------------------------------------------------- diffusers, in the interpreter with torch


def their_network(folder: pathlib.Path, name: str) -> None:
    """Writes a pipeline of random weights to folder/name, and its outputs to folder/name.npz."""
    from diffusers import DDPMPipeline, DDPMScheduler

    settings, t = NETWORKS[name]
    model, size = pretrained_fixture.random_unet(7, **settings), settings["sample_size"]
    DDPMPipeline(model, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder / name)
    x, t = np.random.default_rng(3).standard_normal((len(t), size, size, 3), np.float32), np.array(t)
    scales = {"unit": 1, "low": LOW}
    outputs = {kind: pretrained_fixture.outputs(model, np.float32(scale) * x, t) for kind, scale in scales.items()}
    np.savez(folder / f"{name}.npz", x=x, t=t, **outputs)


def their_chains(folder: pathlib.Path, num: int) -> None:
    """Writes theirs.npz: chains of the exported run with our noise, and `num` images of each pipeline of diffusers."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
    from diffusers.schedulers import scheduling_ddpm

    pipeline = DDPMPipeline.from_pretrained(folder / "exported")
    pipeline.set_progress_bar_config(disable=True)
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    noise = torch.from_numpy(np.load(folder / "noise.npy").transpose(0, 1, 4, 2, 3).copy())
    randn_tensor, images, current = scheduling_ddpm.randn_tensor, {}, {}
    scheduling_ddpm.randn_tensor = lambda *_, **__: noise[current["t"] + 1]

    def chain(scheduler, **options):
        x, num_steps = noise[0], len(noise) - 1
        scheduler.set_timesteps(num_steps)
        with torch.no_grad():
            for t in scheduler.timesteps:
                current["t"] = int(t)
                x = scheduler.step(pipeline.unet(x, t).sample, t, x, **options).prev_sample
        return x.numpy().transpose(0, 2, 3, 1)

    images["ancestral"] = chain(pipeline.scheduler)
    images["ddim clipped"] = chain(ddim, use_clipped_model_output=True)
    images["ddim default"] = chain(ddim)
    scheduling_ddpm.randn_tensor = randn_tensor

    ddim_pipeline = DDIMPipeline(unet=pipeline.unet, scheduler=ddim)
    ddim_pipeline.set_progress_bar_config(disable=True)
    options = {"batch_size": num, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    images["DDPMPipeline"] = pipeline(**options).images
    images["DDIMPipeline, 50"] = ddim_pipeline(num_inference_steps=50, use_clipped_model_output=True, **options).images
    images["DDIMPipeline, 50, default"] = ddim_pipeline(num_inference_steps=50, **options).images
    images["DDIMPipeline, 1000, default"] = ddim_pipeline(num_inference_steps=len(noise) - 1, **options).images
    np.savez(folder / "theirs.npz", **images)


# ---------------------------------------------------------------- this package, in this interpreter


def print_line(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def run_theirs(args: argparse.Namespace, *task: Any) -> None:
    """Runs `their_network` or `their_chains` in the interpreter with torch."""
    command = [args.torch, "-m", "tools.against_diffusers", "--theirs", *map(str, task)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def compare_network(args: argparse.Namespace, folder: pathlib.Path, name: str) -> None:
    """Prints the largest differences of the outputs, and whether the exported tensors equal the imported ones."""
    import jax
    from safetensors import numpy as safetensors

    import diffusion_jax
    from diffusion_jax.configs import default
    from diffusion_jax.interop import diffusers

    run_theirs(args, "network", folder, name)
    workdir = folder / f"{name}-run"
    with contextlib.redirect_stdout(sys.stderr):
        diffusers.import_diffusers(str(folder / name), str(workdir), default.get_config())
    apply_fn, params, _ = diffusion_jax.load_network(workdir)
    apply_fn = jax.jit(apply_fn)
    with np.load(folder / f"{name}.npz") as theirs:
        for kind, scale in (("unit", 1), ("low", LOW)):
            ours = np.asarray(apply_fn({"params": params}, np.float32(scale) * theirs["x"], theirs["t"]))
            difference, deviation = float(abs(ours - theirs[kind]).max()), float(theirs[kind].std())
            print_line(network=name, inputs=f"x {scale}", largest_difference=difference, deviation=deviation)
    with contextlib.redirect_stdout(sys.stderr):
        diffusers.export_diffusers(str(workdir), str(folder / f"{name}-out"))
    imported, exported = (
        safetensors.load_file(folder / subfolder / "unet" / "diffusion_pytorch_model.safetensors")
        for subfolder in (name, f"{name}-out")
    )
    same = imported.keys() == exported.keys() and all(np.array_equal(imported[key], exported[key]) for key in imported)
    num_parameters = sum(tensor.size for tensor in imported.values())
    print_line(network=name, parameters=num_parameters, tensors_back_bit_for_bit=same)


def compare_chains(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Prints the differences between the exported run in diffusers' schedulers and pipelines, and `sampling`."""
    import jax

    import diffusion_jax
    from diffusion_jax import sampling, schedule
    from diffusion_jax.evaluation import metrics, quality
    from diffusion_jax.interop import diffusers

    with contextlib.redirect_stdout(sys.stderr):
        diffusers.export_diffusers(args.workdir, str(folder / "exported"))
    apply_fn, params, s = diffusion_jax.load_network(args.workdir)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), np.arange(4))
    size = diffusion_jax.load(args.workdir, 1)[0](params, jax.random.key(0)).shape[1:]
    noise = jax.vmap(lambda t: sampling.normal(keys, t, size))(np.arange(s.num_steps + 1))
    np.save(folder / "noise.npy", noise)
    run_theirs(args, "chains", folder, args.num)

    options = {"keys": keys, "clip": (-1, 1)}
    eps_bar_fn, ts = lambda x, t: apply_fn({"params": params}, x, t), sampling.grid_uniform(s, s.num_steps)
    ancestral = jax.jit(lambda x: sampling.reverse_chain(eps_bar_fn, s, schedule.sigma_beta(s), x, **options))(noise[0])
    ddim = jax.jit(lambda x: sampling.ddim_chain(eps_bar_fn, s, ts, x, **options))(noise[0])
    with np.load(folder / "theirs.npz") as file:
        theirs = dict(file)
    for name, ours in (("ancestral", ancestral), ("ddim clipped", ddim), ("ddim default", ddim)):
        difference = abs(np.asarray(ours) - theirs[name])
        print_line(injected_noise=name, largest_difference=float(difference.max()), mean=float(difference.mean()))

    def ours(seed, **sampler):
        sample_fn, params = diffusion_jax.load(args.workdir, args.num, **sampler)
        return np.asarray(sample_fn(params, jax.random.key(seed)))

    def distance(x, y):
        x, y = (quality.pixels(np.rint((np.clip(a, -1, 1) + 1) * 127.5).astype(np.uint8)) for a in (x, y))
        return round(metrics.frechet_of_features(x, y), 3)

    pipelines = {
        "ancestral": ({}, ["DDPMPipeline"]),
        "ddim, 50": ({"sampler": "ddim", "steps": 50}, ["DDIMPipeline, 50", "DDIMPipeline, 50, default"]),
        "ddim, 1000": ({"sampler": "ddim", "steps": s.num_steps}, ["DDIMPipeline, 1000, default"]),
    }
    for sampler, (settings, names) in pipelines.items():
        first, second = (ours(seed, **settings) for seed in (0, 1))
        print_line(images=args.num, sampler=sampler, ours_to_ours=distance(first, second))
        for name in names:
            pixels = theirs[name] * 2 - 1  # pipelines return images in [0, 1]
            print_line(images=args.num, pipeline=name, to_ours=[distance(x, pixels) for x in (first, second)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", help="an interpreter with torch and diffusers")
    parser.add_argument("--workdir", help="a run of configs/digits.py; without it, only networks are compared")
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--num", type=int, default=500, help="number of images for the Fréchet distance")
    parser.add_argument("--theirs", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        task, folder, name = args.theirs
        folder = pathlib.Path(folder)
        their_network(folder, name) if task == "network" else their_chains(folder, int(name))
        return
    if not args.torch:
        parser.error("--torch is missing: give an interpreter with torch and diffusers")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            compare_network(args, pathlib.Path(folder), name)
        if args.workdir:
            compare_chains(args, pathlib.Path(folder))


if __name__ == "__main__":
    main()
