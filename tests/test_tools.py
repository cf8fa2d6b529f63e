import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import diffusion_jax
from tools import hub_logits, mutate


def test_every_mutant_can_be_planted():
    """A mutant must follow when its text changes."""
    assert len(mutate.MUTANTS) >= 17
    for module, before, after in mutate.MUTANTS:
        text = (pathlib.Path(diffusion_jax.__file__).parent / f"{module}.py").read_text()
        assert text.count(before) == 1, (module, before)
        assert before != after


def test_published_outputs_are_those_of_the_first_row_at_diffusers_step_10():
    noise = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    expected = 11 * noise[0, 0, 0, :30]
    found = hub_logits.difference(lambda _, x, t: t[:, None, None, None] * x, {}, noise, expected)
    assert found == pytest.approx(0, abs=1e-5)
    assert all(len(row) == 30 for row in hub_logits.PUBLISHED.values())


@pytest.mark.slow
def test_a_short_torture(tmp_path):
    """A kill during a save and a SIGTERM; the long torture is run by hand."""
    short = ["--only=kills", "--kills=1", "--terms=1", "--steps=60"]
    command = [sys.executable, "-m", "tools.torture", f"--workdir={tmp_path}", *short]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        command, cwd=pathlib.Path(__file__).parent.parent, env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
