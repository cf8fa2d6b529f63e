"""The HTML report is one self-contained, well-formed and escaped page that shows what the workdir holds."""

import base64
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import tiny_config
from etils import epath

from diffusion_jax import parts
from diffusion_jax.data import sources
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import report
from diffusion_jax.pictures import grids
from diffusion_jax.running import workdir as workdirs

LINE = {"loss": 0.5, "grad_norm": 1.0, "param_norm": 9.0, "learning_rate": 1e-3, "images_per_second": 50.0}
LINE |= {f"loss_t{i}": 0.1 * i for i in range(1, 5)} | {"steps_per_second": 2.0}


class Page(html.parser.HTMLParser):
    """The balanced tags of a page, its words and its charts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.charts = [
            ElementTree.fromstring(base64.b64decode(image["src"].split(",")[1]))
            for image in self.all("img")
            if image["src"].startswith("data:image/svg+xml;base64,")
        ]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data.strip()

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def titles(self):
        return [image["alt"].split(":")[0] for image in self.all("img")]


def curves(chart):
    """Points of each stretch of each line: [[2, 3]] is one line with a gap."""
    paths = [path.attrib for path in chart.findall(".//{*}path") if "clip-path" in path.attrib]
    lines = [path["d"] for path in paths if "#e0e0e0" not in path["style"]]  # the colour of the grid
    return [[len(re.findall("[ML]", stretch)) for stretch in re.findall("M[^M]*", line)] for line in lines]


def dots(chart):
    return len(chart.findall(".//{*}g[@clip-path]/{*}use"))


def rendered(workdir, **kwargs):
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


def test_whole_run(run, capsys):
    write_metrics(run, [LINE | {"step": 10 * i, "loss": 1 / i, "images_per_second": 100.0 * i} for i in range(1, 31)])
    for step in (100, 300):
        grids.save_png(run / "samples" / f"{step}.png", np.full((4, 6, 1), step % 256, np.uint8))
        (run / "checkpoints" / str(step)).mkdir(parents=True)  # empty: reading a checkpoint would fail
    (run / "events.out.tfevents.1700000000.host").write_bytes(b"")
    loss_by_t = {"t": list(range(20)), "loss": [0.5] * 19 + [None]}
    folder = write_evaluation(run, 300, {"bits_per_dim": 3.25, "loss_by_t": loss_by_t})
    grids.save_png(folder / "progressive.png", np.zeros((2, 3, 3), np.uint8))
    write_evaluation(run, 100, {"older": 1})

    page = rendered(run)
    assert f"report of step 300: {run / 'report.html'}" in capsys.readouterr().out
    assert list(run.glob("*.partial")) == []
    words = ("run <1>", "300 of", "100, 300", "2,550", "2023-11-14 22:13 UTC", "0:02:30", "3.25", "progressive.png")
    assert [word for word in words if word not in page.text] == []
    assert "older" not in page.text
    parameters = parts.num_parameters(tiny_config())
    assert f"parameters{parameters:,}" in page.text
    assert [curves(chart) for chart in page.charts] == [[[30]], [[30]] * 4, *[[[30]]] * 4, [[19]]]
    assert page.all("img")[0]["alt"].startswith("Loss: loss from 1 at step 10 to 0.033333 at step 300, least 0.033333")

    # The page loads nothing, and each picture is a file of the workdir.
    assert "default-src 'none'; img-src data:" in page.all("meta")[1]["content"]
    assert not [value for _, attributes in page.tags for value in attributes.values() if "://" in (value or "")]
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    assert not re.search(r"url\(|@import", (run / "report.html").read_text())
    files = [run / "samples" / "100.png", run / "samples" / "300.png", folder / "progressive.png"]
    sources = [image["src"] for image in page.all("img") if "image/png" in image["src"]]
    assert sources == [f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]


def test_missing_parts_are_named(run):
    page = rendered(run)
    for words in ("no metrics yet", "no grids of samples yet", "no evaluation yet", "0 of", "train.ema_decay"):
        assert words in page.text
    assert not page.all("img")


def test_null_is_a_gap_and_damaged_lines_are_counted(run):
    losses = [1.0, 0.9, None, 0.8, None, 0.7, 0.6, 0.5, None]
    lines = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    write_metrics(run, lines, end='[1]\n{"step": "x"}\n{"step": 10, "lo')
    page = rendered(run)
    assert [n for n in curves(page.charts[0])[0] if n > 1] == [2, 3] and dots(page.charts[0]) == 1  # 0.8 stands alone
    assert "damaged and left out: 3." in page.text


def test_rare_and_unknown_metrics_are_drawn(run):
    lines = [{"step": i, "loss": 1.0} | ({} if i % 3 else {"held_out_loss": 2.0}) for i in range(9)]
    write_metrics(run, [*lines, {"step": 9, "loss": 1.0, "new": 1, "words": "no number", "flag": True}])
    page = rendered(run)
    assert curves(page.charts[0]) == [[10], [3]] and page.titles() == ["Loss", "new"] and dots(page.charts[1]) == 1
    assert "held_out_loss from 2 at step 0 to 2 at step 6" in page.all("img")[0]["alt"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": null, "loss": 1}',
        b'{"step": "3", "loss": 1}',
        b'{"step": true, "loss": 1}',
        b'{"step": 1.5, "loss": 1}',
        b'{"step": -1, "loss": 1}',
        b'{"step": 1e400, "loss": 1}',
        b'{"step": 1' + b"0" * 400 + b', "loss": 1}',
        b'{"step": 1' + b"0" * 5000 + b"}",
        b'{"loss": 1}',
        b'{"step": 3, "loss": 1',
        b'{"step": 3, "l\xff": 1}',
        b"[" * 100_000,
        b'{"step": 3, "loss": ' + b"[" * 100_000,
        b"[3]",
        b"3",
        b"null",
        b"",
    ],
)
def test_damaged_lines_are_skipped_and_counted(tmp_path, line):
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 2, "loss": 3.0}\n')
    curves, num_damaged = report._read_curves(path)
    assert num_damaged == 1 and curves.keys() == {"step", "loss"}
    np.testing.assert_array_equal(curves["loss"], [[1, 2], [2, 3]])


def test_values_beyond_float32_are_gaps_and_counted(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    values = [1.0, float("inf"), float("nan"), 1e308, -1e308, 10**400, None, 3.0]
    path.write_text("".join(json.dumps({"step": i, "loss": x, "other": i}) + "\n" for i, x in enumerate(values)))
    curves, num_damaged = report._read_curves(path)
    np.testing.assert_array_equal(curves["loss"], [range(8), [1, *[np.nan] * 6, 3]])
    np.testing.assert_array_equal(curves["other"], [range(8), range(8)])  # the rest of such a line counts
    assert num_damaged == 5


NUMBERS = [[0.0, 0.0], [-1.0, 1.0], [3.0], [1e-9, 1e9], [None], [float("inf"), 1e-30, 5.0]]
NUMBERS += [[1e308, 1.0], [1e308, -1e308], [3e38, -3e38], [3e38, 5e-324], [5e-324, 5e-324], [10**400, 1.0]]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("losses", NUMBERS, ids=range(len(NUMBERS)))
def test_any_numbers_can_be_drawn(run, losses):
    lines = [{"step": i, "loss": loss, "new": loss, "steps_per_second": 0.0} for i, loss in enumerate(losses)]
    write_metrics(run, lines)
    page = rendered(run)
    num_finite = sum(loss is not None and abs(loss) <= report.LARGEST for loss in losses)
    assert [curves(chart) for chart in page.charts] == ([[[num_finite]]] * 2 if num_finite else [])
    assert page.text.count("No finite value") == (0 if num_finite else 2)


def test_means_over_many_lines(run):
    write_metrics(run, [{"step": i, "loss": 1 + i % 2, "new": None if i % 3 else 1} for i in range(1000)])
    page = rendered(run)
    assert "means of 5 values" in page.text
    loss, new = report._charts(report._read_curves(run / "metrics.jsonl")[0], 5, 1000)
    values, means = loss.figure.axes[0].lines
    assert len(values.get_ydata()) == 1000 and values.get_alpha() < 0.5 < means.get_linewidth()
    np.testing.assert_allclose(means.get_ydata(), [1.4, 1.6] * 100)
    np.testing.assert_allclose(means.get_xdata(), np.arange(2, 1000, 5))
    assert dots(page.charts[1]) == 334 and "least 1, greatest 1" in new.alt  # no group is whole: the values are drawn


def test_thinned_lines_keep_extremes_and_gaps():
    y = np.sin(np.arange(100_003) / 5000)
    y[[777, 70_000]] = 9, -9
    y[20_000:30_000] = np.nan
    x, thinned = report._thinned(np.array([np.arange(len(y)), y]))
    assert len(x) <= report.POINTS and (np.diff(x) >= 0).all()
    np.testing.assert_array_equal(thinned, y[x.astype(int)])
    assert (np.nanmax(thinned), np.nanmin(thinned)) == (9, -9)
    steps = x[np.isnan(thinned)]
    assert 90 < len(steps) < 102 and steps.min() >= 20_000 and steps.max() < 30_000
    np.testing.assert_array_equal(report._thinned(np.ones((2, 1000))), np.ones((2, 1000)))


def test_many_lines_make_a_small_page(run):
    write_metrics(run, [{"step": i, "loss": 1 + i % 7, "new": i % 5 if i % 2 else None} for i in range(20_000)])
    write_evaluation(run, 5, {"values": [i % 11 for i in range(20_000)]})
    page = rendered(run)
    assert (run / "report.html").stat().st_size < 250_000
    assert "least 1, greatest 7" in page.all("img")[0]["alt"]
    assert "of more than 1,000 the least and the greatest" in page.text


def test_quarters_of_t():
    """The labels agree with the training step, whose quarter is (t − 1) 4 // T."""
    for num_steps in (1000, 10, 7):
        quarters = (np.arange(1, num_steps + 1) - 1) * 4 // num_steps
        for i in range(4):
            t = 1 + np.flatnonzero(quarters == i)
            assert report._label(f"loss_t{i + 1}", num_steps) == f"t = {t[0]:,} … {t[-1]:,}"


def test_at_most_twelve_grids(run):
    for i in range(1, 31):
        grids.save_png(run / "samples" / f"{100 * i}.png", np.zeros((2, 2, 1), np.uint8))
    (run / "samples" / "best.png").write_bytes(b"not a step")
    page = rendered(run)
    steps = [int(image["alt"].removesuffix(".png")) for image in page.all("img")]
    assert len(steps) == 12 and steps[0] == 100 and steps[-1] == 3000 and set(np.diff(steps)) <= {200, 300}
    assert "step 3,000" in page.text and "12 of 30 grids" in page.text


def test_splits_share_tables_and_charts(run):
    t = list(range(1, 41))

    def split(n):
        rate_distortion = {"t": t, "rate": [x / 10 for x in t], "distortion": t}
        return {"n": n, "why": None, "loss_by_t": {"t": t, "loss": t}, "rate_distortion": rate_distortion}

    values = {"clip": [-1, 1], "ok": True, "unlike": {"a": {"x": 1}, "b": {"y": 2}}}
    write_evaluation(run, 5, values | {"splits": {"train": split(60000), "test": split(10000)}})
    page = rendered(run)
    assert "traintestn60,00010,000images that were measuredwhynone: it was not measurednone: it was not" in page.text
    assert "The loss at each step t: near 1" in page.text and "clip-1, 1oktrueunlikeax1by2" in page.text
    assert page.titles() == ["loss over t", "rate over t", "distortion over t", "distortion over rate"]
    assert [curves(chart) for chart in page.charts] == [[[40], [40]]] * 4
    assert "no pictures" in page.text


def test_an_evaluation_begins_with_verdicts(run):
    split = {"bits_per_dim": 3.0, "png_bits_per_dim": 4.0}
    write_evaluation(run, 5, {"splits": {"test": split}, "samples": {"protocol": {"checksum": ""}}})
    text = rendered(run).text
    assert "Step 5.test: 3.00 bits/dim, where PNG files take 4.00; fewer, as a good model does." in text
    assert "none: pixels have no weights" in text
    write_evaluation(run, 6, {"splits": [], "samples": {"frechet_floor": 3}})
    assert "Step 6." in rendered(run).text


def test_left_out_steps_are_drawn_if_there_are_any(run):
    file = run / "metrics.jsonl"
    lines = [{"step": 100, "loss": 1.0, "skipped": 0.0}, {"step": 200, "loss": 1.0, "skipped": 0.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rendered(run).titles() == ["Loss"]
    file.write_text("".join(json.dumps(line | {"skipped": 0.25}) + "\n" for line in lines))
    assert rendered(run).titles() == ["Loss", "Share of the steps that were left out as not finite"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "values, titles",
    [
        ({"rate": [1.0] * 9, "distortion": [2.0] * 9, "n": 3}, ["distortion over rate"]),
        ({"losses": [1.0] * 9}, ["losses over index"]),
        ({"a": [1.0] * 9, "b": [1.0] * 10}, ["b over index"]),
        ([1.0] * 9, ["value over index"]),
        ({"short": [1, 2], "words": ["a"] * 20, "empty": {}, "deep": {"a": {"b": {"c": {"d": 1}}}}}, []),
        ({"huge": [10**400, 1e308] * 5, "x": 10**400}, []),
        ({"\ud800": "\ud800", "lists": {"t": [1] * 9, "\ud800": [1] * 9}}, ["? over t"]),
        ("{", []),
        ("", []),
        ("[" * 100_000, []),
        ('{"a":' * 100_000, []),
    ],
)
def test_any_evaluation_can_be_shown(run, values, titles):
    write_evaluation(run, 5, values)
    page = rendered(run)
    assert page.titles() == titles and ("is not JSON" in page.text) == isinstance(values, str)
    assert page.all("h3") or "deep" not in values


def test_files_of_another_kind_are_left_out(run):
    (run / "samples" / "100.png").mkdir(parents=True)
    grids.save_png(run / "samples" / "200.png", np.zeros((2, 2, 1), np.uint8))
    grids.save_png(run / "samples" / "300.png", np.zeros((2, 2, 1), np.uint8))
    (run / "samples" / "200.png").write_bytes((run / "samples" / "300.png").read_bytes()[:-6])
    (run / "evaluation" / "5" / "evaluation.json").mkdir(parents=True)
    (run / "evaluation" / "6").write_text("")
    (run / "events.out.tfevents.99999999999999999999.host").write_bytes(b"")
    write_metrics(run, [{"step": 1, "\ud800": 1.0, "steps_per_second": 5e-324}])
    page = rendered(run)
    assert page.titles() == ["?", "300.png"] and page.text.count("is not a PNG, or damaged") == 2
    assert "The evaluation has no numbers" in page.text and "first started" not in page.text


def test_the_data_set_is_the_path_that_takes_the_place_of_the_source(tmp_path):
    (tmp_path / "tfds" / "celeb_a").mkdir(parents=True)
    named = {"digits": "", "files": "x.zip", "tfds:celeb_a": str(tmp_path / "tfds")}
    assert [sources.name_of(*pair) for pair in named.items()] == ["digits", "x.zip", "tfds:celeb_a"]
    assert sources.name_of("digits", "x.zip") == sources.name_of("tfds:celeb_a", "x.zip") == "x.zip"
    workdirs.write_config(tmp_path, tiny_config(data__path="x.zip"))
    assert f"data{os.path.abspath('x.zip')}, 8 × 8 × 1" in rendered(tmp_path).text


def test_file_that_is_no_png_is_left_out(run):
    (write_evaluation(run, 5, {}) / "nearest.png").write_bytes(b"GIF89a")
    page = rendered(run)
    assert not page.all("img") and "nearest.png is not a PNG" in page.text


def test_everything_is_escaped(run):
    evil = '"><script>alert(1)</script>&$\\x$'
    (run / "config.json").write_text(json.dumps(tiny_config(data__path=evil, data__split=evil).to_dict()))
    write_metrics(run, [{"step": i, evil: float(i)} for i in range(3)])
    values = {evil: evil, "list": [evil], "lists": {"t": [1] * 9, evil: [2] * 9}, "x": [{evil: 1}]}
    grids.save_png(write_evaluation(run, 5, values) / "a&<b>'.png", np.zeros((2, 2, 1), np.uint8))
    page = rendered(run, chart_format="svg")
    assert "<script" not in (run / "report.html").read_text()
    assert page.text.count(evil) >= 7 and page.all("img")[-1]["alt"] == "a&<b>'.png"
    assert [text for text in page.charts[0].findall(".//{*}text") if text.text == evil]
    assert {path.parent.name for path in run.rglob("*.svg")} == {"report-charts"}


def test_config_of_another_version(run):
    config = json.loads((run / "config.json").read_text())
    del config["train"]["accumulate"], config["model"]["prediction"]
    (run / "config.json").write_text(json.dumps(config))
    write_metrics(run, [LINE | {"step": 1}])
    assert "train.accumulate1" in rendered(run).text  # the default


@pytest.mark.slow
def test_chart_files(run):
    write_metrics(run, [{"step": i, "loss": 0.5} for i in range(1, 4)])
    write_evaluation(run, 5, {"a": {"loss": [1] * 9}, "b": {"other": 1, "c": {"loss": [2] * 9}}})
    names = ["loss", "loss-over-index", "loss-over-index-2"]
    page = rendered(run, chart_format="svg")
    folder = run / "report-charts"
    assert {path.name for path in folder.iterdir()} == {f"{name}.svg" for name in names}
    first = {path: path.read_bytes() for path in folder.iterdir()}
    assert base64.b64encode(first[folder / "loss.svg"]).decode() in page.all("img")[0]["src"]
    report.report(run, chart_format="svg")
    assert {path: path.read_bytes() for path in folder.iterdir()} == first
    report.report(run, run / "paper.html", "png")
    assert {path.name for path in (run / "paper-charts").iterdir()} == {f"{name}.png" for name in names}
    with pytest.raises(UserError, match="--format=pdf is not a format of charts: give svg or png"):
        report.report(run, chart_format="pdf")


@pytest.mark.slow
def test_no_device_and_no_pyplot(run):
    """A computation would fail on the platform none_such, and pyplot would look for a screen."""
    command = "import sys; from diffusion_jax.evaluation import report; report.report(sys.argv[1])"
    command += "; assert 'matplotlib.pyplot' not in sys.modules"
    root = str(pathlib.Path(report.__file__).parents[2])
    env = os.environ | {"JAX_PLATFORMS": "none_such", "PYTHONPATH": root}
    write_metrics(run, [LINE | {"step": 1}])
    subprocess.run([sys.executable, "-c", command, str(run)], env=env, check=True)
    page = Page((run / "report.html").read_text())
    assert re.search(r"parameters[\d,]+", page.text) and len(page.charts) == 6


def test_out_is_another_file(run, tmp_path):
    report.report(str(run), str(tmp_path / "new" / "page.html"))
    Page((tmp_path / "new" / "page.html").read_text())
    assert not (run / "report.html").exists()


def test_errors_name_workdir_and_out(run, tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        report.report(tmp_path / "none")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match=f"--out={re.escape(str(out))} cannot be written"):
            report.report(run, out)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_report_knows_classes(tmp_path):
    """The names of the classes; a column for each classifier; why a number is missing, and what each is."""
    names = ("<cat>", *(f"n{i}" for i in range(24)))
    workdirs.write_config(tmp_path, tiny_config(model__num_classes=25, data__classes=names))
    values = {"accuracy": 0.875, "standard_error": 0.0625, "held_out_accuracy": 0.96875}
    both = {"logistic_regression": values, "nearest_neighbours": values | {"accuracy": 0.75}}
    protocol = {"metrics": {"frechet_within_classes": {"left_out": "few samples"}}}
    samples = {"frechet_within_classes": None, "protocol": protocol, "classifiers": both}
    folder = tmp_path / "evaluation" / "3"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"step": 3, "samples": samples}))
    text = rendered(tmp_path).text
    assert "classes25: <cat>, n0, n1" in text and "n18, …" in text and "n19" not in text.split("images seen")[0]
    assert "logistic_regressionnearest_neighboursaccuracy0.8750.75" in text
    assert "frechet_within_classesnone: few samples[mean over the classes, error]" in text


def test_the_report_of_a_run_without_classes(tmp_path):
    workdirs.write_config(tmp_path, tiny_config())
    assert "classes" not in rendered(tmp_path).text.split("images seen")[0]
