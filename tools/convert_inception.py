"""Writes the weights of FID's Inception as the .npz that `diffusion_jax.evaluation.inception` reads. Needs torch.

    python -m tools.convert_inception pt_inception-2015-12-05-6726825d.pth inception.npz

The .pth is that of pytorch-fid's or torch-fidelity's releases: TensorFlow's weights of 2015-12-05,
under the Apache License 2.0. What comes out has its names and layouts, without the classifier. Prints
the SHA-256 of the .pth, whose first digits its name tells.
"""

import argparse
import hashlib
import pathlib

import numpy as np

from diffusion_jax.errors import UserError, one_line


def convert(source: str, out: str) -> str:
    """Writes `out`; returns the SHA-256 of `source`.

    Raises:
      UserError: no torch, no such file, not these weights, or `out` cannot be written.
    """
    try:
        import torch
    except ImportError:
        raise UserError("torch is missing, which this conversion reads the .pth with: pip install torch") from None
    if not out.endswith(".npz"):
        raise UserError(f"{out} must end in .npz")
    try:
        digest = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()
        state = torch.load(source, map_location="cpu", weights_only=True)
        arrays = {name: np.asarray(tensor) for name, tensor in state.items()}
    except Exception as error:  # the file system's, pickle's, torch's own
        raise UserError(f"{source} is no state dict of torch ({one_line(error, 200)}): download it again") from None
    # torchvision's Inception has the same names, but is another network, and has 1000 classes.
    if "fc.weight" not in arrays or arrays["fc.weight"].shape != (1008, 2048):
        raise UserError(f"{source} is not FID's Inception, which has fc.weight of (1008, 2048): give pytorch-fid's")
    dropped = ("fc.", "AuxLogits.")
    arrays = {
        name: array.astype(np.float32)
        for name, array in arrays.items()
        if not name.startswith(dropped) and not name.endswith("num_batches_tracked")
    }
    partial = pathlib.Path(f"{out}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): give another file") from None
    return digest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the .pth")
    parser.add_argument("out", help="the .npz to write")
    args = parser.parse_args()
    try:
        print(f"{args.source}: SHA-256 {convert(args.source, args.out)}")
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
