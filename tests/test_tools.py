import itertools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import Examples

import diffusion_jax
from benchmarks import all as benchmarks
from tools import ema_sweep, guidance_sweep, hub_logits, mutate


def test_every_mutant_can_be_planted():
    """A mutant must follow when its text changes."""
    for first, mutants in mutate.MUTANTS.items():
        file, _, test = first.partition("::")
        assert f"def {test}(" in (mutate.ROOT / file).read_text() and mutants
    for module, before, after in itertools.chain(*mutate.MUTANTS.values()):
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


def test_benchmarks_become_a_page():
    lines = [{"run": "forward", "jax": "0.12", "spread": [1, 2]}, {"run": "step", "jax": "0.12", "ms": 3}]
    results = [
        {"command": "python -m benchmarks.unet", "seconds": 7, "code": 0, "lines": lines},
        {"command": "python -m benchmarks.x", "seconds": 1, "code": None, "lines": []},
        {"command": "python -m benchmarks.y", "seconds": 1, "code": 2, "lines": lines[:1], "error": ["no such flag"]},
    ]
    page = benchmarks.page({"jax": "0.12"}, results, ["benchmarks.z"])
    assert (
        "| run     | spread | ms  |" in page
        and "| forward | 1 to 2 |     |" in page
        and "\n- jax: 0.12\n- 7 s\n" in page
    )
    assert "No line was printed.\n\n- 1 s, ended before it was done" in page and "- 1 s, failed; no such flag" in page
    assert page.endswith("Not run for want of time: `python -m benchmarks.z`\n")
    assert benchmarks._cell([8, 8, {"cached": [1, 2], "fresh": None}]) == "8, 8, cached 1 to 2, fresh "


def test_a_benchmark_keeps_its_lines_when_it_is_ended_or_fails(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time; print('{\"a\": 1}', flush=True); time.sleep(60)")
    (tmp_path / "wrong.py").write_text("print('{\"a\": 2}'); raise SystemExit('no torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    slow, wrong = benchmarks.measure("slow", 2), benchmarks.measure("wrong", 60)
    assert slow["code"] is None and slow["lines"] == [{"a": 1}] and slow["command"] == "python -m slow"
    assert wrong["code"] == 1 and wrong["lines"] == [{"a": 2}] and wrong["error"] == ["no torch"]


def test_a_sweep_of_guidance_makes_a_table_and_a_chart(tmp_path):
    labels = np.arange(200) % 2
    noise = np.random.default_rng(0).integers(0, 60, (200, 2, 2, 1))
    real = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)

    class Real(Examples):
        classes = ("a", "b")

        def __getitem__(self, indices):
            return self.arrays["image"][indices]

    wrong = np.concatenate([real[2:3].repeat(20, axis=0), real[20:120]])  # twenty samples of the class 0
    rows = {w: guidance_sweep.measure(x, {"train": Real(real, labels)}) for w, x in ((0.0, wrong), (1.5, real[:120]))}
    table = guidance_sweep.table(rows)
    assert len(table) == 5 and table[2].startswith("| 0 ") and "91.7% ± 2.5%" in table[2]
    assert table[3].startswith("| 1.5 ") and "100.0% ± 0.0%" in table[3]
    assert table[4].startswith("| held out ") and "100.0%" in table[4]
    assert rows[0.0]["frechet"][0] > rows[1.5]["frechet"][0] and rows[1.5]["settings"]["classifiers"]["fit"] == 160
    guidance_sweep.write_chart(rows, str(tmp_path / "guidance.svg"))
    assert "Fréchet distance" in (tmp_path / "guidance.svg").read_text()


def test_a_sweep_of_lengths_makes_a_table_and_a_chart(tmp_path):
    real = np.random.default_rng(0).integers(0, 256, (60, 2, 2, 1)).astype(np.uint8)
    rows = [
        ema_sweep.measure(real[i : i + 50] // d, real, ema) for i, d, ema in ((0, 3, None), (5, 1, 0.05), (0, 2, 0.1))
    ]
    assert rows[1][1] < rows[2][1] < rows[0][1]
    table = ema_sweep.table(rows, 0.995)
    assert len(table) == 5 and table[2].startswith("| decay 0.995 ") and table[3].startswith("| 0.05 ")
    ema_sweep.write_chart(rows, 0.995, str(tmp_path / "ema.svg"))
    assert "post-hoc average" in (tmp_path / "ema.svg").read_text()
