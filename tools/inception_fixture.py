"""Writes tests/fixtures/inception.npz: torch-fidelity's features of random images, with random weights.

    pip install torch && pip install --no-deps torch-fidelity && python -m tools.inception_fixture

The seed determines the weights and the images, so the file holds only the features.
"""

import importlib.util
import math
import pathlib
import sys
import types
from typing import Any
from unittest import mock

import numpy as np

SEED = 0
SHAPE = (2, 40, 56, 3)
FILE = pathlib.Path("tests/fixtures/inception.npz")


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = SEED) -> dict[str, np.ndarray]:
    """Returns {name: float32 array} of the shapes, drawn in the order of the names, with activations of order 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("running_var"):
            array = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            array = rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / math.prod(shape[1:])))
        else:
            array = rng.uniform(-0.2, 0.2, shape) + name.endswith("weight")
        weights[name] = array.astype(np.float32)
    return weights


def random_images(shape: tuple[int, ...] = SHAPE, seed: int = SEED) -> np.ndarray:
    """Returns uint8 images [B, H, W, C] whose left half is brighter and noisier than the right."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.linspace(256, 64, shape[2], dtype=int)[:, None], shape, np.uint8)


def torch_fidelity() -> Any:
    """Returns torch-fidelity's Inception with random weights."""
    # Importing the package would import torchvision, which its Inception does not need.
    package = types.ModuleType("torch_fidelity")
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    sys.modules["torch_fidelity"] = package
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with mock.patch("torch.load"), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    arrays = {name: array for name, array in model.state_dict().items() if not name.startswith("fc.") and array.ndim}
    weights = random_weights({name: tuple(array.shape) for name, array in arrays.items()})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    return model


def features(model: Any, images: np.ndarray) -> np.ndarray:
    """Returns the features float32 [B, 2048] of images uint8 [B, H, W, 3]."""
    import torch

    return model(torch.from_numpy(images.transpose(0, 3, 1, 2)))[0].numpy()


def main() -> None:
    FILE.parent.mkdir(exist_ok=True)
    np.savez(FILE, features=features(torch_fidelity(), random_images()))


if __name__ == "__main__":
    main()
