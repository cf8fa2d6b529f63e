import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import diffusion_jax
from tools import frechet, mutate


def test_every_mutant_can_be_planted():
    """Where the text has changed, so must the mutant."""
    assert len(mutate.MUTANTS) >= 17
    for module, before, after in mutate.MUTANTS:
        text = (pathlib.Path(diffusion_jax.__file__).parent / f"{module}.py").read_text()
        assert text.count(before) == 1, (module, before)
        assert before != after


def test_frechet_distance_of_known_moments():
    """Commuting covariances: |μ_x − μ_y|² + Σ (σ_x − σ_y)²."""
    corners = np.array([[i, j] for i in (-1.0, 1.0) for j in (-1.0, 1.0)]) * np.sqrt(3 / 4)  # covariance 1
    x, y = corners * [1.0, 2.0], corners * [3.0, 2.5] + [0.5, 0.0]
    assert frechet.frechet_distance(x, y) == pytest.approx(0.25 + 4 + 0.25)
    assert frechet.frechet_distance(x, x) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_does_not_depend_on_the_axes():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((60, 4)) * [1, 2, 3, 4]
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    distance = frechet.frechet_distance(x, y)
    assert frechet.frechet_distance(x @ rotation, y @ rotation) == pytest.approx(distance)
    assert frechet.frechet_distance(y, x) == pytest.approx(distance)


def test_a_short_torture(tmp_path):
    """A few kills, a restore that forgets, 2 processes with 2 devices: the long one is run by hand."""
    sections = "--only=kills,mutants,devices"
    short = ["--kills=3", "--terms=1", "--steps=200"]
    command = [sys.executable, "-m", "tools.torture", f"--workdir={tmp_path}", sections, *short]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        command, cwd=pathlib.Path(__file__).parent.parent, env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'caught': ['data position', 'optimiser', 'ema', 'step'], 'of': 4" in done.stdout
