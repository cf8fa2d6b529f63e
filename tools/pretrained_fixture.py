"""Writes tests/fixtures/diffusers/: a small pipeline of diffusers with random weights, and outputs of its network.

    pip install torch diffusers safetensors && python -m tools.pretrained_fixture

`DDPMPipeline.save_pretrained` writes the folder. outputs.npz holds images x [3, 8, 8, 3] of unit variance, steps t
in 1..T, and the network's outputs for x and for x × 0.01. classes.npz holds class embeddings for the same network,
labels [3], and the outputs for x with both.
"""

import pathlib
from typing import Any

import numpy as np

SEED = 0
FOLDER = pathlib.Path("tests/fixtures/diffusers")
LOW_CONTRAST = 0.01
LABELS = (0, 2, 3)  # of 4 embeddings
# The settings of google/ddpm-cifar10-32 with smaller sizes; the middle level has attention.
UNET = {
    "sample_size": 8,
    "block_out_channels": [4, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def random_unet(seed: int = SEED, **settings: Any) -> Any:
    """Returns a UNet2DModel with random norms and biases too, so that every weight changes the outputs."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    model = UNet2DModel(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model: Any, x: np.ndarray, t: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """Returns the network's outputs for images [B, H, W, C] at steps t in 1..T, which diffusers calls 0..T−1."""
    import torch

    with torch.no_grad():
        images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        class_labels = None if labels is None else torch.from_numpy(labels)
        return model(images, torch.from_numpy(t - 1), class_labels).sample.numpy().transpose(0, 2, 3, 1)


def main() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    model = random_unet(**UNET)
    DDPMPipeline(model, DDPMScheduler(variance_type="fixed_large")).save_pretrained(FOLDER)
    x = np.random.default_rng(SEED).standard_normal((3, 8, 8, 3), np.float32)
    t = np.array([1, 500, 1000])
    low = outputs(model, np.float32(LOW_CONTRAST) * x, t)
    np.savez(FOLDER / "outputs.npz", x=x, t=t, unit=outputs(model, x, t), low=low)
    with_classes, labels = random_unet(**UNET, num_class_embeds=4), np.array(LABELS)
    with_classes.load_state_dict(model.state_dict(), strict=False)
    embedding = with_classes.class_embedding.weight.detach().numpy()
    np.savez(FOLDER / "classes.npz", embedding=embedding, labels=labels, unit=outputs(with_classes, x, t, labels))


if __name__ == "__main__":
    main()
