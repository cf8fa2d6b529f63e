"""Runs the benchmarks one after another, and writes what they measured as JSON and as Markdown.

    python -m benchmarks.all --minutes=10 --out=bench

Each benchmark is a process of its own, and none starts after --minutes. One that runs then is ended with its time, and
keeps the lines that it printed. bench.json and bench.md are written after each: the machine, the versions, and for each
benchmark its command, its seconds and its lines. --torch, a Python with torch and diffusers, adds the comparison with
diffusers.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from typing import Any

import jax
from absl import app, flags

from diffusion_jax.running import files
from diffusion_jax.running.tables import markdown_table

MINUTES = flags.DEFINE_float("minutes", 10, "time for all benchmarks together")
OUT = flags.DEFINE_string("out", "bench", "path of the files, without .json and .md")
TORCH = flags.DEFINE_string("torch", "", "a Python with torch and diffusers")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

# The arguments after python -m, the most telling ones first, and last the one that takes the longest.
COMMANDS = (
    "benchmarks.unet --config=configs/cifar10.py --batch=16",
    "benchmarks.roofline --config=configs/cifar10.py --batch=16",
    "benchmarks.sampling --config=configs/digits.py",
    "benchmarks.pipeline --config=configs/digits.py",
    "benchmarks.sources --large=100",
    "benchmarks.dispatch",
    "benchmarks.levers --config=configs/digits.py",
)


def machine() -> dict[str, Any]:
    """Returns the date, the machine and the versions of the packages."""
    devices = jax.devices()
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "cpu": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def measure(command: str, seconds: float) -> dict[str, Any]:
    """Runs a benchmark for at most `seconds`; returns its command, seconds, exit code (None: ended) and JSON lines."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    code = process.returncode if process.returncode >= 0 else None
    result = {"command": f"python -m {command}", "seconds": round(time.monotonic() - start), "code": code}
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return result | {"lines": lines} | ({"error": err.strip().splitlines()[-1:]} if code else {})


def page(about: dict[str, Any], results: list[dict[str, Any]], left: list[str]) -> str:
    """Returns the results as Markdown; `left` are the commands that were not run."""
    text = ["# Benchmarks", "", *markdown_table(["", ""], [list(map(str, row)) for row in about.items()])]
    for result in results:
        text += ["", f"## `{result['command']}`", ""]
        keys = list(dict.fromkeys(key for line in result["lines"] for key in line))
        shared = {key for key in keys if len({json.dumps(line.get(key)) for line in result["lines"]}) == 1}
        shared = shared if len(result["lines"]) > 1 else set()
        rows = [[_cell(line.get(key)) for key in keys if key not in shared] for line in result["lines"]]
        text += markdown_table([key for key in keys if key not in shared], rows) if rows else ["No line was printed."]
        text += ["", *(f"- {key}: {_cell(result['lines'][0][key])}" for key in keys if key in shared)]
        end = "" if result["code"] == 0 else ", ended before it was done" if result["code"] is None else ", failed"
        text.append(f"- {result['seconds']} s{end}{'; '.join(['', *result.get('error', [])])}")
    text += ["", *(f"Not run for want of time: `python -m {command}`" for command in left)]
    return "\n".join(text).rstrip() + "\n"


def _cell(value):
    if isinstance(value, list):  # two are the least and the largest
        return (" to " if len(value) == 2 else ", ").join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items())
    return "" if value is None else str(value)


def main(_: list[str]) -> None:
    commands = list(COMMANDS)
    if TORCH.value:
        commands.insert(0, f"benchmarks.peer --torch={shlex.quote(TORCH.value)} --config=configs/cifar10.py --batch=16")
    about, results, deadline = machine(), [], time.monotonic() + 60 * MINUTES.value
    while commands and time.monotonic() < deadline:
        command = commands.pop(0)
        print(f"python -m {command}", file=sys.stderr, flush=True)
        results.append(measure(command, deadline - time.monotonic()))
        content = {"machine": about, "results": results, "not_run": commands}
        files.write_text(f"{OUT.value}.json", json.dumps(content, indent=1) + "\n")
        files.write_text(f"{OUT.value}.md", page(about, results, commands))
    print(f"{OUT.value}.md and {OUT.value}.json: {len(results)} benchmarks, {len(commands)} not run")


if __name__ == "__main__":
    app.run(main)
