import os
import pathlib
import subprocess
import sys

import jax
import pytest

import diffusion_jax
from tools import mutate


def test_every_mutant_can_be_planted():
    """Where the text has changed, so must the mutant."""
    assert len(mutate.MUTANTS) >= 17
    for module, before, after in mutate.MUTANTS:
        text = (pathlib.Path(diffusion_jax.__file__).parent / f"{module}.py").read_text()
        assert text.count(before) == 1, (module, before)
        assert before != after


@pytest.mark.slow
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
