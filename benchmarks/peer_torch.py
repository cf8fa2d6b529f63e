"""The torch side of `benchmarks.peer`, which needs only torch and diffusers.

The process first prints a JSON line about its versions. It then reads names of benchmarks from stdin, one a line, runs
each, and prints the seconds per step.
"""

import json
import sys
import time

import diffusers
import numpy as np
import torch
from torch.nn.functional import mse_loss


def main(folder: str, device: str, dtype: str, batch: str, steps: str, calls: str, compiled: str) -> None:
    batch, steps, calls, compiled = int(batch), int(steps), int(calls), compiled == "True"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    model = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").to(device)
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    example = np.load(f"{folder}/example.npz")

    def images(x):
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device)

    with torch.no_grad():
        y = model.eval()(images(example["x"]), torch.from_numpy(example["t"] - 1).to(device)).sample
    expected = images(example["y"])
    difference = float((y - expected).abs().max() / expected.abs().max())
    if difference > (1e-4 if dtype == torch.float32 else 0.1):
        sys.exit(f"error: the networks differ: their outputs by {difference:.1e} of the largest output")

    network = torch.compile(model) if compiled else model
    mixed = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=device == "cuda")
    shape = (batch, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    x = torch.randn(shape, device=device)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    t = torch.full((batch,), 499, device=device)
    every_t = torch.arange(1000, device=device)  # numbers would be compiled one by one

    def forward():
        with torch.no_grad(), mixed:
            network(x, t)

    def train_step():
        model.train()
        noise = torch.randn(shape, device=device)
        t = torch.randint(0, 1000, (batch,), device=device)
        noisy = scheduler.add_noise(pixels.float() / 127.5 - 1, noise, t)
        optimizer.zero_grad(set_to_none=True)
        with mixed:
            loss = mse_loss(network(noisy, t).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1e-4)
        model.eval()

    def chain():
        sample = x
        with torch.no_grad():
            for k in range(999, 999 - steps, -1):
                with mixed:
                    eps = network(sample, every_t[k].expand(batch)).sample.float()
                sample = scheduler.step(eps, k, sample).prev_sample

    runs = {"forward": (forward, 1), "train step": (train_step, 1), "chain step": (chain, steps)}
    about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "torch.compile": compiled}
    print(json.dumps(about | {"difference": difference}), flush=True)
    for line in sys.stdin:
        run, times = runs[line.strip()]
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps((time.perf_counter() - start) / (calls * times)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
