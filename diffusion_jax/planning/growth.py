"""How the time of a train step changes with the number of chips, at one global batch; an estimate from one program.

On n devices each takes 1/n of the images. The FLOPs, and the bytes of the activations, shrink with them; the bytes of
the parameters do not, and the gradient is sent whichever their number.
"""

import itertools
from typing import NamedTuple

from diffusion_jax.planning.programs import Chip, roofline

# Bytes that a step moves for each parameter, whatever the batch: float32 parameters, gradients, Adam's two moments and
# the average are each read and written.
UPDATE = 5 * 2 * 4


class Size(NamedTuple):
    """A train step on some number of devices."""

    devices: int
    images: float  # of a device
    seconds: float
    compute: float  # seconds without the links
    links: float  # seconds
    efficiency: float  # images a device and second, relative to one device without links


def sizes(
    chip: Chip, per_device: dict[str, float], images: float, devices: int, parameters: int, largest: int
) -> list[Size]:
    """Returns the step on 1, 2, 4 … `largest` devices, each of which gets at least one image.

    Args:
      chip: the device.
      per_device: "flops" and "hbm_bytes" of the compiled step on one of `devices` devices, see `programs.needs`.
      images: the images of a device in that program.
      devices: the devices of that program.
      parameters: the number of parameters; their gradient is sent in float32.
      largest: devices of a pod.
    """
    batch, fixed = images * devices, min(UPDATE * parameters, per_device["hbm_bytes"])
    of_image = {"flops": per_device["flops"] / images, "hbm_bytes": (per_device["hbm_bytes"] - fixed) / images}
    numbers = itertools.takewhile(lambda n: n <= min(largest, batch), (2**i for i in itertools.count()))
    return [_size(chip, of_image, fixed, batch / n, n, parameters, batch) for n in numbers]


def _size(chip, of_image, fixed, images, devices, parameters, batch):
    def step(images, devices):
        sent = 2 * 4 * parameters * (devices - 1) / devices
        return roofline(chip, of_image["flops"] * images, of_image["hbm_bytes"] * images + fixed, sent)

    parts, alone = step(images, devices), step(batch, 1)["seconds"]
    links = parts["links_seconds"]
    efficiency = alone / (devices * parts["seconds"])
    return Size(devices, images, parts["seconds"], parts["seconds"] - links, links, efficiency)


def pays(of_sizes: list[Size], least: float = 0.5) -> Size:
    """Returns the largest of `of_sizes` whose efficiency is at least `least`: more devices cost more than they save."""
    return [size for size in of_sizes if size.efficiency >= least][-1]
