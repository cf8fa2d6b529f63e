"""The lines of metrics.jsonl, and the steps of which they are means."""

import json
import time

import pytest
from etils import epath

from diffusion_jax.evaluation import report
from diffusion_jax.running import log as logs
from diffusion_jax.running.log import MetricsLog


def lines(folder):
    """Returns the lines of metrics.jsonl without the speeds."""
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(x).items() if "per_second" not in k} for x in text.splitlines()]


def train(folder, start, stop, end, every, pending=(), evaluate_every=0):
    """Logs the steps start + 1..stop of a run of `end` steps, and returns the steps that belong into its checkpoint."""
    folder.mkdir(exist_ok=True)
    with MetricsLog(epath.Path(folder), start, every, pending) as log:
        for step in range(start + 1, stop + 1):
            log.add(step, {"loss": float(step**2)}, 8)
            if evaluate_every and step % evaluate_every == 0:
                log.add_evaluation(step, {"held_out_loss": 1.0}, 0.0)
        pending = list(log.pending)
        if stop == end:
            log.finish(stop, 8)
    return pending


@pytest.mark.parametrize("every", [1, 3, 4, 7, 20])
@pytest.mark.parametrize("stop", range(1, 10))
@pytest.mark.parametrize("evaluate_every", [0, 2, 3])
def test_lines_do_not_depend_on_the_stop(tmp_path, every, stop, evaluate_every):
    train(tmp_path / "whole", 0, 10, 10, every, evaluate_every=evaluate_every)
    pending = train(tmp_path / "stopped", 0, stop, 10, every, evaluate_every=evaluate_every)
    train(tmp_path / "stopped", stop, 10, 10, every, json.loads(json.dumps(pending)), evaluate_every)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    assert lines(tmp_path / "whole")[-1]["step"] == 10


@pytest.mark.parametrize("every", [3, 4, 7, 20])
@pytest.mark.parametrize("first", range(1, 10))
def test_lines_do_not_depend_on_the_length_of_earlier_starts(tmp_path, every, first):
    """A run that ended at step `first`, and is then continued to step 10."""
    train(tmp_path / "whole", 0, 10, 10, every)
    pending = train(tmp_path / "longer", 0, first, first, every)
    assert lines(tmp_path / "longer")[-1]["step"] == first
    train(tmp_path / "longer", first, 10, 10, every, pending)
    assert lines(tmp_path / "longer") == lines(tmp_path / "whole")


@pytest.mark.parametrize("remote", [False, True])
def test_later_and_damaged_lines_are_cut(tmp_path, monkeypatch, remote):
    good = [json.dumps({"step": step, "loss": 1.0, "steps_per_second": 1.0}) for step in (2, 4, 6, 8)]
    damaged = ['{"step": null, "loss": 1}', '{"step": "3"}', "[" * 100_000, '{"step": 5', "", "[1]", "\xff"]
    text = "\n".join([good[0], damaged[0], good[1], *damaged, good[2], good[3]])  # the last without a line end
    (tmp_path / "metrics.jsonl").write_text(text, encoding="latin1")
    if remote:
        monkeypatch.setattr(MetricsLog, "_is_remote", lambda self: True)
    with MetricsLog(epath.Path(tmp_path), 5, 2) as log:
        assert log._last["step"] == 4
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join([good[0], damaged[0], good[1], ""])


def test_a_log_without_a_good_line_is_emptied(tmp_path):
    for content in ("", "\n", '{"step": 9}\n', "{"):
        (tmp_path / "metrics.jsonl").write_text(content)
        with MetricsLog(epath.Path(tmp_path), 5, 2) as log:
            assert not log.has_evaluation(5)
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_an_evaluation_that_is_there_is_not_made_again(tmp_path):
    train(tmp_path, 0, 4, 8, 2, evaluate_every=4)
    for start, expected in ((4, True), (3, False), (2, False)):
        with MetricsLog(epath.Path(tmp_path), start, 2) as log:
            assert log.has_evaluation(start) == expected


def test_speed_is_that_of_the_interval(tmp_path, monkeypatch):
    """Steps of one second each, of which the last two are read at once."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    speeds = []
    with MetricsLog(epath.Path(tmp_path), 0, 1) as log:
        for step, now in ((1, 103.0), (2, 104.0), (3, 104.0), (4, 104.0)):
            clock[0] = now
            speeds.append(log.add(step, {"loss": 0.0}, 8, started=100.0 + step)["steps_per_second"])
    assert speeds == [pytest.approx(1 / 3), pytest.approx(1), pytest.approx(1), pytest.approx(1)]


def test_a_long_log_opens_by_its_end(tmp_path, monkeypatch):
    line = json.dumps({"step": 1, "loss": 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 100_000)
    parsed = []
    monkeypatch.setattr(logs, "parse_line", lambda text: parsed.append(text) or json.loads(text))
    with MetricsLog(epath.Path(tmp_path), 5, 2):
        pass
    assert len(parsed) == 1


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
