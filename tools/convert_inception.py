"""Converts the weights of FID's Inception to the .npz file that `evaluation.inception` reads. Needs torch.

    python -m tools.convert_inception pt_inception-2015-12-05-6726825d.pth inception.npz

The .pth file comes from the releases of pytorch-fid or torch-fidelity: TensorFlow's weights of 2015-12-05,
under the Apache License 2.0. The .npz file keeps the names and layouts, and leaves out the classifier. The
script prints the SHA-256 of the .pth file, whose name ends in the first digits.
"""

import argparse
import hashlib
import pathlib

import numpy as np

from diffusion_jax.errors import UserError, one_line


def convert(source: str, out: str) -> str:
    """Converts the .pth file `source` to the .npz file `out`.

    Returns:
      The hex SHA-256 of `source`.

    Raises:
      UserError: torch is missing, `source` does not hold these weights, or `out` cannot be written.
    """
    try:
        import torch
    except ImportError:
        raise UserError("torch is missing, which reads the .pth file: pip install torch") from None
    if not out.endswith(".npz"):
        raise UserError(f"{out} must end in .npz: give another name")
    try:
        digest = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()
        state = torch.load(source, map_location="cpu", weights_only=True)
        arrays = {name: np.asarray(tensor) for name, tensor in state.items()}
    except Exception as error:  # the file system, pickle and torch raise many types
        raise UserError(f"{source} is not a state dict of torch ({one_line(error, 200)}): download it again") from None
    # torchvision's Inception has the same names, but it is another network with 1000 classes.
    if "fc.weight" not in arrays or arrays["fc.weight"].shape != (1008, 2048):
        raise UserError(f"{source} is not FID's Inception, whose fc.weight is (1008, 2048): give pytorch-fid's file")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the .pth file")
    parser.add_argument("out", help="the .npz file to write")
    args = parser.parse_args()
    try:
        print(f"{args.source}: SHA-256 {convert(args.source, args.out)}")
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
