"""Our networks and chains against diffusers', as docs/pretrained.md states: a JSON line for each comparison.

    python -m tools.against_diffusers --torch=/path/to/python --workdir=runs/digits

diffusers runs in another interpreter, --torch, which has torch and diffusers and need not have jax. First
networks of random weights in the published configurations, unit variance and × 0.01, and their tensors there
and back; then, with --workdir (of configs/digits.py), the exported run in diffusers' pipelines: with our noise
injected, and by the Fréchet distance between --num images of theirs and of ours.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile

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
# name: (settings of the UNet2DModel, steps t of one image each)
NETWORKS = {
    "fixture": (pretrained_fixture.UNET, (1, 500, 1000)),
    "ddpm-cifar10-32": (CIFAR10, (1, 400, 1000)),
    "ddpm-celebahq-256": (CELEBAHQ, (400,)),
}


# ---------------------------------------------------------------- in the interpreter with torch


def their_network(folder, name):
    """A pipeline of random weights in folder/name, and its outputs."""
    from diffusers import DDPMPipeline, DDPMScheduler

    settings, t = NETWORKS[name]
    model, size = pretrained_fixture.random_unet(7, **settings), settings["sample_size"]
    DDPMPipeline(model, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder / name)
    x, t = np.random.default_rng(3).standard_normal((len(t), size, size, 3), np.float32), np.array(t)
    found = {kind: pretrained_fixture.outputs(model, np.float32(by) * x, t) for kind, by in (("unit", 1), ("low", LOW))}
    np.savez(folder / f"{name}.npz", x=x, t=t, **found)


def their_chains(folder, num):
    """Chains of the exported run by diffusers' schedulers, with the noise of ours, and images of its pipelines."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
    from diffusers.schedulers import scheduling_ddpm

    pipeline = DDPMPipeline.from_pretrained(folder / "exported")
    pipeline.set_progress_bar_config(disable=True)
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    noise = torch.from_numpy(np.load(folder / "noise.npy").transpose(0, 1, 4, 2, 3).copy())
    draw, found, now = scheduling_ddpm.randn_tensor, {}, {}
    scheduling_ddpm.randn_tensor = lambda *_, **__: noise[now["t"] + 1]

    def chain(scheduler, **how):
        x, num_steps = noise[0], len(noise) - 1
        scheduler.set_timesteps(num_steps)
        with torch.no_grad():
            for t in scheduler.timesteps:
                now["t"] = int(t)
                x = scheduler.step(pipeline.unet(x, t).sample, t, x, **how).prev_sample
        return x.numpy().transpose(0, 2, 3, 1)

    found["ancestral"] = chain(pipeline.scheduler)
    found["ddim clipped"] = chain(ddim, use_clipped_model_output=True)
    found["ddim default"] = chain(ddim)
    scheduling_ddpm.randn_tensor = draw

    ddim_pipeline = DDIMPipeline(unet=pipeline.unet, scheduler=ddim)
    ddim_pipeline.set_progress_bar_config(disable=True)
    how = {"batch_size": num, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    found["DDPMPipeline"] = pipeline(**how).images
    found["DDIMPipeline, 50"] = ddim_pipeline(num_inference_steps=50, use_clipped_model_output=True, **how).images
    found["DDIMPipeline, 50, default"] = ddim_pipeline(num_inference_steps=50, **how).images
    found["DDIMPipeline, 1000, default"] = ddim_pipeline(num_inference_steps=len(noise) - 1, **how).images
    np.savez(folder / "theirs.npz", **found)


# ---------------------------------------------------------------- here


def say(**line):
    print(json.dumps(line), flush=True)


def in_torch(args, *what):
    command = [args.torch, "-m", "tools.against_diffusers", "--theirs", *map(str, what)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def compare_network(args, folder, name):
    """Largest differences of the outputs, and whether the tensors come back bit for bit."""
    import jax
    from safetensors import numpy as safetensors

    import diffusion_jax
    from diffusion_jax.configs import default
    from diffusion_jax.interop import diffusers

    in_torch(args, "network", folder, name)
    workdir = folder / f"{name}-run"
    with contextlib.redirect_stdout(sys.stderr):
        diffusers.import_diffusers(str(folder / name), str(workdir), default.get_config())
    apply_fn, params, _ = diffusion_jax.load_network(workdir)
    apply_fn = jax.jit(apply_fn)
    with np.load(folder / f"{name}.npz") as theirs:
        for kind, by in (("unit", 1), ("low", LOW)):
            ours = np.asarray(apply_fn({"params": params}, np.float32(by) * theirs["x"], theirs["t"]))
            difference = float(abs(ours - theirs[kind]).max())
            say(network=name, inputs=f"x {by}", largest_difference=difference, deviation=float(theirs[kind].std()))
    with contextlib.redirect_stdout(sys.stderr):
        diffusers.export_diffusers(str(workdir), str(folder / f"{name}-out"))
    first, again = (
        safetensors.load_file(folder / end / "unet" / "diffusion_pytorch_model.safetensors")
        for end in (name, f"{name}-out")
    )
    same = first.keys() == again.keys() and all(np.array_equal(first[key], again[key]) for key in first)
    num_parameters = sum(tensor.size for tensor in first.values())
    say(network=name, parameters=num_parameters, tensors_back_bit_for_bit=same)


def compare_chains(args, folder):
    """The exported run in diffusers' schedulers and pipelines against `sampling`."""
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
    in_torch(args, "chains", folder, args.num)

    how = {"keys": keys, "clip": (-1, 1)}
    eps_bar_fn, ts = lambda x, t: apply_fn({"params": params}, x, t), sampling.grid_uniform(s, s.num_steps)
    ancestral = jax.jit(lambda x: sampling.reverse_chain(eps_bar_fn, s, schedule.sigma_beta(s), x, **how))(noise[0])
    ddim = jax.jit(lambda x: sampling.ddim_chain(eps_bar_fn, s, ts, x, **how))(noise[0])
    with np.load(folder / "theirs.npz") as file:
        theirs = dict(file)
    for name, ours in (("ancestral", ancestral), ("ddim clipped", ddim), ("ddim default", ddim)):
        difference = abs(np.asarray(ours) - theirs[name])
        say(injected_noise=name, largest_difference=float(difference.max()), mean=float(difference.mean()))

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
    for sampler, (how, names) in pipelines.items():
        first, second = (ours(seed, **how) for seed in (0, 1))
        say(images=args.num, sampler=sampler, ours_to_ours=distance(first, second))
        for name in names:
            pixels = theirs[name] * 2 - 1  # pipelines give [0, 1]
            say(images=args.num, pipeline=name, to_ours=[distance(x, pixels) for x in (first, second)])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", help="the interpreter that has torch and diffusers")
    parser.add_argument("--workdir", help="of a run of configs/digits.py; without it, networks alone")
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--num", type=int, default=500, help="images")
    parser.add_argument("--theirs", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        what, folder, name = args.theirs
        folder = pathlib.Path(folder)
        their_network(folder, name) if what == "network" else their_chains(folder, int(name))
        return
    if not args.torch:
        parser.error("--torch is missing: the interpreter that has torch and diffusers")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            compare_network(args, pathlib.Path(folder), name)
        if args.workdir:
            compare_chains(args, pathlib.Path(folder))


if __name__ == "__main__":
    main()
