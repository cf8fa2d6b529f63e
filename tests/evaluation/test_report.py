"""The page of a run is whole, well-formed and safe, and says what the workdir holds."""

import base64
import html.parser
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import report
from diffusion_jax.pictures import grids
from diffusion_jax.running import workdir as workdirs

VOID = {"meta", "img"}
LINE = {"loss": 0.5, "grad_norm": 1.0, "param_norm": 9.0, "learning_rate": 1e-3, "images_per_second": 50.0}
LINE |= {f"loss_t{i}": 0.1 * i for i in range(1, 5)} | {"steps_per_second": 2.0}


class Page(html.parser.HTMLParser):
    """The tags of a page, balanced; the points of its lines; its words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def lines(self):
        return [len(line["points"].split()) for line in self.all("polyline")]


def written(workdir, **kwargs):
    report.report(workdir, **kwargs)
    return Page((workdir / "report.html").read_text(encoding="utf-8"))


def write_metrics(workdir, lines, end=""):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def write_evaluation(workdir, step, values):
    folder = workdir / "evaluation" / str(step)
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.fixture
def run(tmp_path):
    """A workdir with a config and nothing else."""
    workdir = tmp_path / "run <1>"
    workdirs.write_config(workdir, tiny_config())
    return workdir


def test_a_whole_run(run, capsys):
    write_metrics(run, [LINE | {"step": 10 * i, "loss": 1 / i, "images_per_second": 100.0 * i} for i in range(1, 31)])
    for step in (100, 300):
        grids.save_png(run / "samples" / f"{step}.png", np.full((4, 6, 1), step % 256, np.uint8))
        (run / "checkpoints" / str(step)).mkdir(parents=True)
    (run / "events.out.tfevents.1700000000.host").write_bytes(b"")
    curves = {"t": list(range(20)), "loss": [0.5] * 19 + [None]}
    folder = write_evaluation(run, 300, {"bits_per_dim": 3.25, "loss_by_t": curves})
    grids.save_png(folder / "progressive.png", np.zeros((2, 3, 3), np.uint8))
    write_evaluation(run, 100, {"older": 1})

    page = written(run)
    assert f"report of step 300: {run / 'report.html'}" in capsys.readouterr().out
    assert list(run.glob("*.partial")) == []
    for words in (
        "run <1>",
        "300 of",
        "100, 300",
        "2,550",
        "2023-11-14 22:13 UTC",
        "0:02:30",
        "3.25",
        "progressive.png",
    ):
        assert words in page.text, words
    assert "older" not in page.text
    parameters = sum(np.prod(x.shape) for x in report.jax.tree.leaves(report.abstract_state(tiny_config()).params))
    assert f"parameters{parameters:,}" in page.text.replace("\n", "")
    assert page.lines() == [30] * 9 + [19]
    assert page.all("svg")[0]["aria-label"].startswith("Loss: loss from 1 at step 10 to 0.033333 at step 300, least")

    # Nothing comes from elsewhere, and every picture is what the workdir holds.
    assert not [value for _, attributes in page.tags for value in attributes.values() if "://" in (value or "")]
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    files = [run / "samples" / "100.png", run / "samples" / "300.png", folder / "progressive.png"]
    for image, file in zip(page.all("img"), files, strict=True):
        head, data = image["src"].split(",")
        content = base64.b64decode(data)
        assert head == "data:image/png;base64" and content == file.read_bytes()
        assert Image.open(io.BytesIO(content)).size == (int(image["width"]), int(image["height"]))


def test_nothing_but_a_config(run):
    page = written(run)
    for words in ("no metrics yet", "no grids of samples yet", "no evaluation yet", "0 of", "train.ema_decay"):
        assert words in page.text
    assert not page.all("svg") and not page.all("img")


def test_null_is_a_gap_and_damaged_lines_are_left_out(run):
    losses = [1.0, 0.9, None, 0.8, None, 0.7, 0.6, 0.5, None]
    lines = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    write_metrics(run, lines, end='[1]\n{"step": "x"}\n{"step": 10, "lo')
    page = written(run)
    assert page.lines() == [2, 3] and len(page.all("circle")) == 1  # 0.8 stands alone
    assert "damaged and left out: 3." in page.text


def test_a_key_that_is_seldom_there_has_a_line_of_its_own(run):
    lines = [
        {"step": i, "loss": 1.0, "held_out_loss": 2.0} if i % 3 == 0 else {"step": i, "loss": 1.0} for i in range(9)
    ]
    write_metrics(run, [*lines, {"step": 9, "loss": 1.0, "new": 1, "words": "no number", "flag": True}])
    page = written(run)
    assert page.lines() == [10, 3] and len(page.all("circle")) == 1
    assert "held_out_loss" in page.text and "new" in page.text and "words" not in page.text and "flag" not in page.text


@pytest.mark.parametrize("losses", [[0.0, 0.0], [-1.0, 1.0], [3.0], [1e-9, 1e9], [None], [float("inf"), 1e-30, 5.0]])
def test_any_numbers_can_be_drawn(run, losses):
    write_metrics(run, [{"step": i, "loss": loss, "new": loss} for i, loss in enumerate(losses)])
    for chart in written(run).all("polyline"):
        x, y = np.array([point.split(",") for point in chart["points"].split()], float).T
        assert (x >= report.LEFT).all() and (x <= report.RIGHT).all()
        assert (y >= report.TOP).all() and (y <= report.BOTTOM).all()


def test_means_over_many_lines(run):
    write_metrics(run, [{"step": i, "loss": 1 + i % 2, "new": None if i % 3 else 1} for i in range(1000)])
    page = written(run)
    assert page.lines() == [1000, 200] and "means of 5 values" in page.text
    mean = next(line for line in page.all("polyline") if "faint" not in line["class"])
    heights = {point.split(",")[1] for point in mean["points"].split()}
    assert len(heights) == 2  # 1.4 and 1.6
    assert len(page.all("circle")) == 334


def test_axes():
    axis = report._linear_axis(np.array([3.0, 97.0]), 5)
    assert axis.ticks == [0, 20, 40, 60, 80, 100] and (axis.low, axis.high) == (0, 100)
    np.testing.assert_allclose(axis.at([0, 50, 100], 10, 20), [10, 15, 20])
    assert report._linear_axis(np.array([100.0, 2500.0]), 5, tight=True).ticks == [500, 1000, 1500, 2000, 2500]
    assert report._linear_axis(np.array([1e-4, 2e-4]), 5).labels()[-1] == "2e-4"
    axis = report._log_axis(np.array([0.001, 100.0]))
    np.testing.assert_allclose(axis.ticks, [0.001, 0.01, 0.1, 1, 10, 100])
    np.testing.assert_allclose(np.diff(axis.at(axis.ticks, 0, 1), 2), 0, atol=1e-12)
    for values in ([0.087, 0.45], [1.0, 1.01], [5.0, 5.0], [1e-12, 1e12]):
        axis = report._log_axis(np.array(values))
        assert axis.low < min(values) and max(values) < axis.high
        assert 1 <= len(axis.ticks) <= 8 and all(axis.low <= tick <= axis.high for tick in axis.ticks)


def test_quarters_of_t(run):
    """As the training step counts them: (t − 1) 4 // T."""
    for num_steps in (1000, 10, 7):
        config = tiny_config(schedule__num_steps=num_steps)
        quarters = (np.arange(1, num_steps + 1) - 1) * 4 // num_steps
        workdirs.write_config(run, config)
        for i in range(4):
            t = 1 + np.flatnonzero(quarters == i)
            assert report._label(f"loss_t{i + 1}", report._read(run)) == f"t = {t[0]:,} … {t[-1]:,}"


def test_at_most_twelve_grids(run):
    for i in range(1, 31):
        grids.save_png(run / "samples" / f"{100 * i}.png", np.zeros((2, 2, 1), np.uint8))
    (run / "samples" / "best.png").write_bytes(b"of another name")
    page = written(run)
    steps = [int(step.replace(",", "")) for step in re.findall(r"step ([\d,]+)", page.text)]
    assert len(page.all("img")) == len(steps) == 12 and steps == sorted(steps)
    assert steps[0] == 100 and steps[-1] == 3000 and set(np.diff(steps)) <= {200, 300}
    assert "12 of 30 grids" in page.text


def test_evaluation_as_tables_and_charts(run):
    t = list(range(1, 41))

    def split(n):
        rate_distortion = {"t": t, "rate": [x / 10 for x in t], "distortion": t}
        return {"n": n, "why": None, "loss_by_t": {"t": t, "loss": t}, "rate_distortion": rate_distortion}

    write_evaluation(run, 5, {"splits": {"train": split(60000), "test": split(10000)}, "clip": [-1, 1], "ok": True})
    page = written(run)
    text = " ".join(page.text.split())
    assert "n60,00010,000 why–– " in text.replace("</td>", "") and "clip-1, 1" in text and "oktrue" in text
    titles = ["loss over t", "rate over t", "distortion over t", "distortion over rate"]
    assert [chart["aria-label"].split(":")[0] for chart in page.all("svg")] == titles
    assert page.lines() == [40] * 8  # a line of each split in one chart
    assert "no pictures" in page.text


@pytest.mark.parametrize(
    "values, charts",
    [
        ({"rate": [1.0] * 9, "distortion": [2.0] * 9, "n": 3}, ["distortion over rate"]),
        ({"losses": [1.0] * 9}, ["losses over index"]),
        ({"a": [1.0] * 9, "b": [1.0] * 10}, ["b over index"]),
        ([1.0] * 9, ["value over index"]),
        ({"short": [1, 2], "words": ["a"] * 20, "empty": {}, "deep": {"a": {"b": {"c": {"d": 1}}}}}, []),
        ("{", []),
    ],
)
def test_any_evaluation_can_be_shown(run, values, charts):
    write_evaluation(run, 5, values)
    page = written(run)
    assert [chart["aria-label"].split(":")[0] for chart in page.all("svg")] == charts
    assert ("is not JSON" in page.text) == (values == "{")


def test_what_is_no_png_is_left_out(run):
    folder = write_evaluation(run, 5, {})
    (folder / "nearest.png").write_bytes(b"GIF89a")
    page = written(run)
    assert not page.all("img") and "nearest.png is no PNG" in page.text


def test_everything_is_escaped(run):
    evil = '"><script>alert(1)</script>&'
    config = tiny_config(data__path=evil).to_dict() | {evil: evil}
    (run / "config.json").write_text(json.dumps(config))
    write_metrics(run, [{"step": i, evil: float(i)} for i in range(3)])
    folder = write_evaluation(
        run, 5, {evil: evil, "list": [evil], "lists": {"t": [1] * 9, evil: [2] * 9}, "x": [{evil: 1}]}
    )
    grids.save_png(folder / "a&<b>'.png", np.zeros((2, 2, 1), np.uint8))
    page = written(run)
    assert "<script" not in (run / "report.html").read_text()
    assert not page.all("script") and page.text.count(evil) >= 8
    assert page.all("img")[0]["alt"] == "a&<b>'.png"


def test_a_config_of_another_version(run):
    (run / "config.json").write_text('{"seed": 0}')
    write_metrics(run, [LINE | {"step": 1}])
    assert "parameters–" in written(run).text.replace("\n", "")


def test_no_device_is_needed(run):
    """A platform that there is not would be an error if anything were to be computed."""
    command = "import sys; from diffusion_jax import report; report.report(sys.argv[1])"
    root = str(pathlib.Path(report.__file__).parents[1])
    env = os.environ | {"JAX_PLATFORMS": "none_such", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", command, str(run)], env=env, check=True)
    text = Page((run / "report.html").read_text()).text.replace("\n", "")
    assert re.search(r"parameters[\d,]+", text)


def test_another_file(run, tmp_path):
    out = tmp_path / "new" / "page.html"
    report.report(str(run), str(out))
    Page(out.read_text())
    assert not (run / "report.html").exists()


def test_what_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report.report(tmp_path / "none")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match=f"--out={re.escape(str(out))} cannot be written"):
            report.report(run, out)
    assert not list(tmp_path.rglob("*.partial"))
