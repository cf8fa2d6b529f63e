"""The lines of metrics.jsonl, and the steps of which they are means."""

import json

from etils import epath

from diffusion_jax.evaluation import report
from diffusion_jax.running.log import MetricsLog


def test_evaluations_keep_the_loss_curve_correct(tmp_path):
    """Evaluates after steps 3 (between two lines), 4 (with a line) and 6 (the second step of an interval)."""
    with MetricsLog(epath.Path(tmp_path), 0, 4) as log:
        for step in range(1, 9):
            log.add(step, {"loss": float(10 * step)}, 8)
            if step in (3, 4, 6):
                log.add_evaluation(step, {"held_out_loss": 1.0}, 0.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps, loss = report._read_curves(tmp_path / "metrics.jsonl")[0]["loss"]
    assert [*zip(steps.tolist(), loss.tolist(), strict=True)] == [(3, 20), (4, 25), (4, 25), (6, 55), (8, 65)]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [3, 4, 6]


def test_an_evaluation_after_steps_without_a_finite_loss(tmp_path):
    with MetricsLog(epath.Path(tmp_path), 0, 2) as log:
        for step in (1, 2):
            log.add(step, {"loss": float("nan")}, 8)
        log.add_evaluation(2, {"held_out_loss": 1.0}, 0.0)
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [None, None]
