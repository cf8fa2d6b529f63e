"""Measures the kinds of sources beside each other: the same pictures as files, Parquet and arrays.

    python -m benchmarks.sources --num=2000 --large=800

The script writes smooth random pictures of 64×64 RGB in each form to a temporary folder. For each it prints a JSON
line with the images per CPU-second of making the cache, of batches from the cache and of batches decoded on the fly.
Then it prints the peak memory of a process that makes the cache of --large MB of noise and reads it once, beside that
of a process with a hundredth of it.
"""

import io
import json
import multiprocessing
import pathlib
import tempfile
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pyarrow
from absl import app, flags
from PIL import Image
from pyarrow import parquet

from benchmarks.pipeline import SECONDS, iterate, measure
from diffusion_jax.configs import own
from diffusion_jax.data import cache, sources

NUM = flags.DEFINE_integer("num", 2000, "pictures of each source")
LARGE = flags.DEFINE_integer("large", 800, "MB of the sources whose memory is measured; 0: none")
SIZE = 64  # pixels of the images in the cache
ROWS = 200  # of a row group


def smooth(i: int) -> np.ndarray:
    """Returns picture i, uint8 [64, 64, 3]."""
    coarse = Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8))
    return np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))


def noise(i: int) -> np.ndarray:
    """Returns picture i, uint8 [128, 128, 3], whose 49 kB no file compresses."""
    return np.random.default_rng(i).integers(0, 256, (128, 128, 3), np.uint8)


def _png(x):
    file = io.BytesIO()
    Image.fromarray(x).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_folder(path: pathlib.Path, num: int, picture: Callable) -> None:
    path.mkdir()
    for i in range(num):
        (path / f"{i:06}.png").write_bytes(_png(picture(i)))


def write_zip(path: pathlib.Path, num: int, picture: Callable) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(num):
            archive.writestr(f"{i:06}.png", _png(picture(i)))


def write_parquet(path: pathlib.Path, num: int, picture: Callable) -> None:
    with parquet.ParquetWriter(path, pyarrow.schema([("image", pyarrow.binary())])) as writer:
        for first in range(0, num, ROWS):
            encoded = [_png(picture(i)) for i in range(first, min(first + ROWS, num))]
            writer.write_table(pyarrow.table({"image": encoded}, writer.schema))


def write_array(
    path: pathlib.Path, num: int, picture: Callable, dtype: str = "uint8", save: Callable = np.save
) -> None:
    array = np.empty((num, *picture(0).shape), dtype)
    for i in range(num):
        array[i] = picture(i)
    save(path, array)


def write_float(path: pathlib.Path, num: int, picture: Callable) -> None:
    write_array(path, num, picture, "float32")


def write_compressed(path: pathlib.Path, num: int, picture: Callable) -> None:
    write_array(path, num, picture, save=np.savez_compressed)


KINDS: dict[str, tuple[Callable, str, tuple[int, int] | None]] = {
    "folder of PNG": (write_folder, "folder", None),
    "zip of PNG": (write_zip, "set.zip", None),
    "Parquet of PNG": (write_parquet, "set.parquet", None),
    ".npy, uint8": (write_array, "uint8.npy", None),
    ".npy, float32": (write_float, "float32.npy", (0, 255)),
    ".npz, compressed, uint8": (write_compressed, "set.npz", None),
}


def opened(path: pathlib.Path, bounds: tuple[int, int] | None, limit: float) -> cache.Cached | cache.OnTheFly:
    source = sources.open_source("files", str(path), bounds=bounds)
    folder = str(path.parent / "cache")
    return cache.open_images(source, image_size=SIZE, channels=3, cache_dir=folder, cache_limit=limit)


def speeds(path: pathlib.Path, bounds: tuple[int, int] | None) -> dict[str, int]:
    """Returns the images per CPU-second."""
    config, started = own.get_config("cpu"), time.process_time()
    cached = opened(path, bounds, float("inf"))
    values = {"making the cache": len(cached) / (time.process_time() - started)}
    for name, images in (("cached", cached), ("on the fly", opened(path, bounds, 0))):
        values[name] = measure(iterate(images, config), SECONDS.value)[0]
    return {name: round(value) for name, value in values.items()}


def peak_mb(path: pathlib.Path, bounds: tuple[int, int] | None) -> int:
    """Returns the peak of this process's memory after it has made the cache and read it once, MB."""
    cached = opened(path, bounds, float("inf"))
    for first in range(0, len(cached), ROWS):
        cached[first : first + ROWS]
    return round(int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000)


def peak_of_new_process(kind: str, num_bytes: float) -> tuple[int, int]:
    """Returns (MB of the source, MB of the process)."""
    write, name, bounds = KINDS[kind]
    num = round(num_bytes / noise(0).nbytes / (4 if "float32" in kind else 1))
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as process:
        path = pathlib.Path(folder) / name
        write(path, num, noise)
        return round(path.stat().st_size / 1e6), process.apply(peak_mb, (path, bounds))


def main(_: list[str]) -> None:
    for kind, (write, name, bounds) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(pathlib.Path(folder) / name, NUM.value, smooth)
            line = {"source": kind, "num": NUM.value, "per_cpu_second": speeds(pathlib.Path(folder) / name, bounds)}
        print(json.dumps(line), flush=True)
    for kind in ("Parquet of PNG", ".npy, uint8", ".npy, float32") if LARGE.value else ():
        few, many = (peak_of_new_process(kind, num_bytes) for num_bytes in (LARGE.value * 1e4, LARGE.value * 1e6))
        print(json.dumps({"source": kind, "source_mb": [few[0], many[0]], "peak_mb": [few[1], many[1]]}), flush=True)


if __name__ == "__main__":
    app.run(main)
