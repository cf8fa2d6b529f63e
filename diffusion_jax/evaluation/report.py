"""The HTML report of a run: one page that loads nothing, made from the files of the workdir.

matplotlib draws the charts and Jinja2 fills report.html.jinja. No checkpoint is read and no device is used.
"""

import array
import base64
import datetime
import io
import json
import math
import re
from typing import NamedTuple

import jinja2
import matplotlib.style
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from diffusion_jax import parts
from diffusion_jax.data.sources import name_of
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.evaluation.meaning import MEANINGS, meaning, verdicts, with_reasons
from diffusion_jax.running import files
from diffusion_jax.running.config import flatten
from diffusion_jax.running.log import parse_line
from diffusion_jax.running.watch import waiting
from diffusion_jax.running.workdir import absolute, read_config

GRIDS = 12  # grids of samples on the page, at most
SHOWN = 20  # names of classes, at most
RECENT = 10  # lines of metrics.jsonl whose median is the speed
LONG = 8  # a longer list of numbers becomes a chart
MANY = 400  # a metric with more values is drawn faint, with a curve of about MEANS means over it
MEANS = 200
POINTS = 1000  # points of a line, at most: of more values it shows the least and greatest of each stretch
LARGEST = float(np.finfo(np.float32).max)  # training computes in float32, and matplotlib overflows near 1e308

# (title, metrics that share the chart, log scale); any other metric gets a chart of its own.
CHARTS = (
    ("Loss", ("loss", "held_out_loss"), True),
    ("Loss by quarter of t", ("loss_t1", "loss_t2", "loss_t3", "loss_t4"), True),
    ("Gradient norm before clipping", ("grad_norm",), True),
    ("Parameter norm", ("param_norm",), False),
    ("Learning rate", ("learning_rate",), False),
    ("Images per second", ("images_per_second",), False),
    ("Share of the steps that were left out as not finite", ("skipped",), False),
)
LATEST = 10**11  # seconds since 1970: the year 5138, which dates can still show
NOT_DRAWN = ("step", "steps_per_second")  # images_per_second draws the same curve as steps_per_second
STYLE = {
    "font.size": 9,
    "path.simplify_threshold": 0.5,  # pixels
    "svg.fonttype": "none",  # text takes fewer bytes than outlines of letters
    "svg.hashsalt": "report",  # equal charts have equal bytes
    "text.parse_math": False,  # a "$" in a name does not start a formula
}


class Picture(NamedTuple):
    """A PNG file of the workdir, or a chart (SVG and its figure). Without content the page shows only the note."""

    title: str
    note: str = ""
    alt: str = ""
    content: bytes = b""
    figure: Figure | None = None

    @property
    def uri(self) -> str:
        """The content as a data: URI."""
        media_type = "image/svg+xml" if self.figure else "image/png"
        return f"data:{media_type};base64,{base64.b64encode(self.content).decode()}"


def report(workdir: epath.PathLike, out: epath.PathLike | None = None, chart_format: str | None = None) -> None:
    """Writes the report of a run as one HTML file, which says what the workdir lacks.

    Args:
      workdir: folder of the run.
      out: the file; None means report.html in `workdir`.
      chart_format: "svg" or "png" also writes each chart to the folder `<out stem>-charts` beside `out`.

    Raises:
      UserError: `workdir` holds no run, `out` cannot be written, or `chart_format` is unknown.
    """
    if chart_format not in (None, "svg", "png"):
        raise UserError(f"--format={chart_format} is not a format of charts: give svg or png")
    config = read_config(workdir)
    workdir = absolute(workdir)
    out = epath.Path(out).expanduser() if out else workdir / "report.html"

    def draw():
        # The style ignores the user's matplotlibrc; ticks of numbers below 1e-307 overflow.
        with matplotlib.style.context(STYLE, after_reset=True), np.errstate(over="ignore"):
            contents = _contents(workdir, config)
            folder = out.with_name(f"{out.stem}-charts")
            return contents, _chart_files(contents, folder, chart_format) if chart_format else {}

    contents, contents_by_path = waiting("drawing the report", draw)
    loader = jinja2.PackageLoader(__package__, "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    contents_by_path[out] = environment.get_template("report.html.jinja").render(contents).encode(errors="replace")
    try:
        for path, content in contents_by_path.items():
            with files.replacing(path) as file:
                file.write(content)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({one_line(error)}): give another file") from None
    print(f"report of step {contents['step']}: {out}")


def _contents(workdir, config):
    """Returns the variables of the template."""
    curves, num_damaged = _read_curves(workdir / "metrics.jsonl")
    checkpoints = sorted(_by_step(workdir / "checkpoints"))
    step = int(max([0, *checkpoints, *curves["step"][0, -1:]]))
    flat = flatten(config)
    group = curves["step"].shape[1] // MEANS if curves["step"].shape[1] > MANY else 1
    grids = sorted(_by_step(workdir / "samples", ".png").items())
    indices = np.unique(np.linspace(0, len(grids) - 1, min(GRIDS, len(grids))).round().astype(int))
    return {
        "title": workdir.name,
        "date": _date(datetime.datetime.now().timestamp()),
        "step": step,
        "facts": _facts(workdir, flat, step, checkpoints, parts.num_parameters(config), curves),
        "charts": _charts(curves, group, flat["schedule.num_steps"]),
        "group": group,
        "points": _cell(POINTS),
        "num_damaged": num_damaged,
        "grids": [_picture(grids[i][1], f"step {grids[i][0]:,}") for i in indices],
        "num_grids": len(grids),
        "evaluation": _evaluation(workdir / "evaluation"),
        "config": _by_group(flat),
    }


def _chart_files(contents, folder, chart_format):
    """Returns {path: content} of all charts, named by their titles; a repeated title gets a number."""
    chart_files = {}
    evaluation = (content for kind, content in contents["evaluation"] if kind == "picture")
    for chart in (picture for picture in (*contents["charts"], *evaluation) if picture.figure):
        stem = re.sub(r"\W+", "-", chart.title.lower()).strip("-") or "chart"
        numbers = ("", *(f"-{i}" for i in range(2, len(chart_files) + 2)))
        path = next(path for i in numbers if (path := folder / f"{stem}{i}.{chart_format}") not in chart_files)
        chart_files[path] = chart.content if chart_format == "svg" else _saved(chart.figure, chart_format)
    return chart_files


# ---------------------------------------------------------------- the files of a workdir


def _read_curves(path):
    """Returns {metric: float [2, n], its steps and values} and the number of damaged lines.

    NaN stands for null, and for values beyond LARGEST, whose lines count as damaged.
    """
    points, num_damaged = {"step": (array.array("d"), array.array("d"))}, 0
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        for text in file:
            line = parse_line(text) or {}
            damaged = not line
            for name, value in line.items():
                if value is None or type(value) is float or _is_number(value):  # the call takes time
                    if name not in points:
                        points[name] = array.array("d"), array.array("d")
                    steps, values = points[name]
                    steps.append(line["step"])
                    values.append(number := _float(value))
                    damaged |= number != number and value is not None
            num_damaged += damaged
    return {_printable(name): np.array(pair) for name, pair in points.items()}, num_damaged


def _float(value):
    """Returns a number or null as a float that matplotlib can draw, or NaN."""
    return value if value is not None and -LARGEST <= value <= LARGEST else math.nan


def _printable(text):
    """Replaces lone surrogates, which JSON may hold and UTF-8 may not."""
    return text.encode(errors="replace").decode()


def _by_step(folder, suffix=""):
    """Returns {step: path} of the entries whose name is a step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(path.stem): path for path in paths if path.stem.isdecimal() and path.suffix == suffix}


def _picture(path, title):
    """Returns a PNG file as a picture, or a note if it is not one."""
    content = path.read_bytes() if path.is_file() else b""
    if not content.startswith(b"\x89PNG\r\n\x1a\n") or b"IEND" not in content[-12:]:
        return Picture(title, f"{path.name} is not a PNG, or damaged: it is left out.")
    return Picture(title, alt=path.name, content=content)


def _by_group(flat):
    """Returns {group: rows of keys and exact values} of a config."""
    groups = {}
    for key, value in flat.items():
        text = value if isinstance(value, str) and value else json.dumps(value)
        groups.setdefault(key.split(".")[0], []).append((key, text))
    return groups


# ---------------------------------------------------------------- sections


def _facts(workdir, flat, step, checkpoints, num_parameters, curves):
    """Returns the rows of the first table; a row without data is left out."""
    source = name_of(flat["data.source"], flat["data.path"])
    size = flat["data.image_size"]
    shape = map(str, (*((size, size) if isinstance(size, int) else size), flat["data.channels"]))
    loss, speed = (_finite(curves, name)[1] for name in ("loss", "images_per_second"))
    rows = {
        "step": f"{_cell(step)} of {_cell(flat['train.num_steps'])}",
        "checkpoints": checkpoints or None,
        "parameters": num_parameters,
        "data": [source, " × ".join(shape)],
        "classes": _classes(flat["data.classes"]) if flat["model.num_classes"] else None,
        "images seen": step * flat["train.batch_size"],
        "loss": f"{_cell(loss[-1])}, least {_cell(loss.min())}" if len(loss) else None,
        "images per second": float(np.median(speed[-RECENT:])) if len(speed) else None,
        **_times(workdir, *_finite(curves, "steps_per_second")),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _classes(names):
    """Returns the number of the classes and the first names."""
    return f"{len(names):,}: {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"


def _finite(curves, name):
    """Returns the steps and the finite values of a metric, float [2, n]."""
    curve = curves.get(name, np.zeros((2, 0)))
    return curve[:, np.isfinite(curve[1])]


def _times(workdir, steps, steps_per_second):
    """Returns the total time of the steps by the logged speeds, and the dates of the first start and the last line."""
    steps, steps_per_second = steps[steps_per_second > 0], steps_per_second[steps_per_second > 0]
    seconds = np.sum(np.diff(steps, prepend=0) / steps_per_second)
    starts = [path.name.split(".")[3] for path in workdir.glob("events.out.tfevents.*")]  # TensorBoard's file names
    starts = [int(start) for start in starts if start.isdecimal() and int(start) < LATEST]
    metrics = workdir / "metrics.jsonl"
    return {
        "time of the steps": str(datetime.timedelta(seconds=round(seconds))) if 0 < seconds < LATEST else None,
        "first started": _date(min(starts)) if starts else None,
        "last line of metrics": _date(metrics.stat().mtime) if metrics.exists() else None,
    }


def _date(seconds):
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _charts(curves, group, num_steps):
    known = {name for _, names, _ in CHARTS for name in names} | set(NOT_DRAWN)
    charts = []
    for title, names, log in (*CHARTS, *((name, (name,), None) for name in curves if name not in known)):
        series = {_label(name, num_steps): curves[name] for name in names if name in curves}
        if series and (names != ("skipped",) or curves["skipped"][1].any()):
            charts.append(chart(title, "step", title, series, log, group))
    return charts


def _label(name, num_steps):
    """Returns the range of t for the loss of a quarter, loss_t1 … loss_t4, and any other name unchanged."""
    quarter = re.fullmatch(r"loss_t([1-4])", name)
    if not quarter:
        return name
    first, last = (-(-i * num_steps // 4) for i in (int(quarter[1]) - 1, int(quarter[1])))
    return f"t = {first + 1:,} … {last:,}"


def _evaluation(folder):
    """Returns (kind, content) for the template: a "note", a heading "h3" … "h6", a "table" or a "picture"."""
    folders = _by_step(folder)
    if not folders:
        return [("note", "There is no evaluation yet (evaluation/).")]
    step, folder = max(folders.items())
    blocks = [("note", f"Step {step:,}.")]
    try:
        values = json.loads((folder / "evaluation.json").read_text())
        blocks += [("note", text) for text in _verdicts(values)]
        values = with_reasons(values)
        blocks += list(_nested("", {"": values if isinstance(values, dict) else {"value": values}}, 2))
    except OSError:
        blocks.append(("note", f"The evaluation has no numbers (evaluation/{step}/evaluation.json)."))
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        blocks.append(("note", f"evaluation/{step}/evaluation.json is not JSON: its numbers are left out."))
    pictures = [("picture", _picture(path, path.name)) for path in sorted(folder.glob("*.png"))]
    return blocks + (pictures or [("note", f"The evaluation has no pictures (evaluation/{step}/*.png).")])


def _verdicts(values):
    """Returns the verdicts on evaluation.json; [] if its content is of another program or damaged."""
    try:
        return verdicts(values)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return []


def _nested(title, columns, level):
    """Yields blocks for {column: dict}: a table row for each key, a chart for each long list of numbers.

    A dict whose values are dicts with a key in common becomes a table with a column for each of them.
    """
    if len(columns) == 1:
        (only,) = columns.values()
        if len(only) > 1 and all(isinstance(value, dict) for value in only.values()):
            columns = only if set.intersection(*map(set, only.values())) else columns
    if title:
        yield f"h{level}", title
        if title in MEANINGS:
            yield "note", MEANINGS[title]
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    nested = [key for key in keys if any(isinstance(column.get(key), dict) for column in columns.values())]
    drawn = [key for key in keys if any(_is_long(column.get(key)) for column in columns.values())]
    rows = [(key, *(_cell(x.get(key)) for x in columns.values())) for key in keys if key not in nested + drawn]
    if rows:
        first = next(iter(columns.values()))
        meanings = [meaning(key, first.get(key)) for key in (row[0] for row in rows)]
        rows = [(*row, text) for row, text in zip(rows, meanings, strict=True)] if any(meanings) else rows
        yield "table", (() if list(columns) == [""] else ("", *columns, *([""] if any(meanings) else [])), rows)
    if drawn:
        yield from _list_charts(columns, drawn)
    for key in nested:
        inner = {name: column[key] for name, column in columns.items() if isinstance(column.get(key), dict)}
        yield from _nested(key, inner, min(level + 1, 6))


def _is_long(value):
    """True for a long list of numbers; null is a gap."""
    return isinstance(value, list) and len(value) > LONG and all(x is None or _is_number(x) for x in value)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list_charts(columns, keys):
    """Yields a chart of each list over the list "t" or "step", else the first list; also distortion over rate."""
    first = next((key for key in ("t", "step") if key in keys), keys[0])
    pairs = [(first, key) for key in keys if key != first] or [("index", first)]
    if {"rate", "distortion"} <= set(keys) and first not in ("rate", "distortion"):
        pairs.append(("rate", "distortion"))
    for x_name, y_name in pairs:
        lists = {name or y_name: column for name, column in columns.items() if _is_long(column.get(y_name))}
        aligned = all(_is_long(x.get(x_name)) and len(x[x_name]) == len(x[y_name]) for x in lists.values())
        x_name = x_name if aligned else "index"
        series = {
            name: np.array(
                [[*map(_float, x[x_name] if aligned else range(len(x[y_name])))], [*map(_float, x[y_name])]], float
            )
            for name, x in lists.items()
        }
        yield "picture", chart(*map(_printable, (f"{y_name} over {x_name}", x_name, y_name)), series)


def _cell(value):
    """Formats a value of a table or an axis."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if not _is_number(value):
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:,.5g}"


# ---------------------------------------------------------------- a chart


def chart(
    title: str, x_name: str, y_name: str, series: dict[str, np.ndarray], log: bool | None = None, group: int = 1
) -> Picture:
    """Returns a chart with a line for each of `series` {name: float [2, n]}; non-finite values are gaps.

    Args:
      log: True uses a log scale if all y are above 0, None if they also span a factor of 50.
      group: number of neighbouring values in a mean; 1 draws no means.
    """
    series = {_printable(name): np.where(np.isfinite(xy).all(axis=0), xy, np.nan) for name, xy in series.items()}
    values = np.concatenate([y[np.isfinite(y)] for _, y in series.values()])
    if not len(values):
        return Picture(title, "No finite value.")
    log = values.min() > 0 and (values.max() > 50 * values.min() if log is None else log)
    figure = Figure(figsize=(4.8, 2.5), layout="constrained")
    axes = figure.subplots()
    lines = [_draw(axes, f"C{i}", xy, group) for i, xy in enumerate(series.values())]
    axes.set(xlabel=x_name, ylabel=y_name)
    axes.spines[["right", "top"]].set_visible(False)
    _set_ticks(axes, values, log)
    if len(lines) > 1:
        figure.legend(lines, series, loc="outside upper left", ncols=2, frameon=False, markerscale=0)
    alt = f"{title}: " + "; ".join(f"{name} {_described(x, y, x_name)}" for name, (x, y) in series.items())
    return Picture(title, "log scale" if log else "", alt, _saved(figure, "svg"), figure)


def _draw(axes, color, xy, group):
    """Draws one line: means over faint values if `group` > 1. A value between two gaps is a dot."""
    means, xy = xy[:, : xy.shape[1] // group * group].reshape(2, -1, group).mean(axis=2), _thinned(xy)
    if group > 1 and np.isfinite(means).any():
        axes.plot(*xy, color=color, alpha=0.25, linewidth=0.6)
        xy = means
    finite = np.pad(np.isfinite(xy[1]), 1)
    alone = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
    return axes.plot(*xy, color=color, linewidth=1.3, marker=".", markevery=alone)[0]


def _thinned(xy):
    """Returns all points of a line, or the least and the greatest of each stretch if there are more than POINTS."""
    n = xy.shape[1]
    if n <= POINTS:
        return xy
    size = -(-n // (POINTS // 2))
    y = np.pad(xy[1], (0, -n % size), constant_values=np.nan).reshape(-1, size)
    extremes = [np.where(np.isnan(y), np.inf, y).argmin(axis=1), np.where(np.isnan(y), -np.inf, y).argmax(axis=1)]
    indices = np.sort(np.stack(extremes, axis=1) + np.arange(0, y.size, size)[:, None], axis=1)
    return xy[:, indices.ravel()]


def _set_ticks(axes, values, log):
    """Sets the scale and the ticks of the axes; numbers look as in the tables."""
    if log:
        decades = math.log10(values.max() / values.min())
        subs = (1,) if decades > 3 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif 0 < values.min() < values.max() / 2:
        axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=5)  # 800,000 fits beside its neighbours
    axes.grid(axis="y", color="0.88")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _cell(float(value)))


def _described(x, y, x_name):
    """Describes a line by its first, last, least and greatest value, for readers who cannot see it."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(y):
        return "has no finite value"
    first, last = (f"{_cell(y[i])} at {x_name} {_cell(x[i])}" for i in (0, -1))
    return f"from {first} to {last}, least {_cell(y.min())}, greatest {_cell(y.max())}"


def _saved(figure, chart_format):
    file = io.BytesIO()
    metadata = {"Date": None} if chart_format == "svg" else None  # equal charts have equal bytes
    figure.savefig(file, format=chart_format, dpi=300, transparent=True, metadata=metadata)
    return file.getvalue()
