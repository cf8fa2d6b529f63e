"""A run as one HTML page that loads nothing, made of the files in its workdir; no checkpoint is read."""

import base64
import contextlib
import datetime
import html
import json
import math
import string
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from diffusion_jax import parts
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running.workdir import absolute, read_config

GRIDS = 12  # of samples that are shown
RECENT = 10  # lines of metrics.jsonl that the speed is the median of
LONG = 8  # numbers: a longer list is drawn
MANY = 400  # lines of metrics.jsonl: of more, means are drawn over the values
MEANS = 200  # about how many
COLOURS = 6  # of lines; later lines take them again
WIDTH, HEIGHT = 480, 250  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 62, 450, 10, 212  # of the room for its lines

# (title, the curves that share it, on a log scale); a curve that is in none has its own.
CHARTS = (
    ("Loss", ("loss", "held_out_loss"), True),
    ("Loss by quarter of t", ("loss_t1", "loss_t2", "loss_t3", "loss_t4"), True),
    ("Gradient norm before clipping", ("grad_norm",), True),
    ("Parameter norm", ("param_norm",), False),
    ("Learning rate", ("learning_rate",), False),
    ("Images per second", ("images_per_second",), False),
)
NOT_DRAWN = ("step", "steps_per_second")  # the latter is images_per_second again


def report(workdir, out=None) -> None:
    """Writes the page of the run in `workdir` to `out`, by default report.html there.

    What the workdir does not hold is left out, and the page says so.

    Raises:
      UserError: `workdir` holds no run, or `out` cannot be written.
    """
    run = _read(workdir)
    out = epath.Path(out).expanduser() if out else run.workdir / "report.html"
    sections = {
        "Facts": _facts(run),
        "Curves": _curves(run),
        "Samples": _samples(run),
        "Evaluation": _evaluation(run),
        "Config": _config(run),
    }
    body = [f'<section id="{name.lower()}">\n<h2>{name}</h2>\n{text}\n</section>' for name, text in sections.items()]
    links = [f'<a href="#{name.lower()}">{name}</a>' for name in sections]
    now = _date(datetime.datetime.now().timestamp())
    page = PAGE.substitute(title=_text(run.workdir.name), links="\n".join(links), body="\n".join(body), date=now)
    _write(out, page)
    print(f"report of step {run.step}: {out}")


def _write(path, text):
    """Writes beside and renames."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"--out={path} cannot be written ({one_line(error)}): give another file") from None


# ---------------------------------------------------------------- what the workdir holds


class _Run(NamedTuple):
    workdir: epath.Path
    config: dict
    lines: list  # of metrics.jsonl: dicts with a step
    damaged: int  # lines that are not whole
    checkpoints: list  # steps

    @property
    def step(self):
        """The last step that is known of."""
        return max([0, *self.checkpoints, *(line["step"] for line in self.lines[-1:])])

    def get(self, key):
        """Of the config, None where it has no such key."""
        return _flatten(self.config).get(key)


def _read(workdir):
    config = read_config(workdir).to_dict()
    workdir = absolute(workdir)
    path = workdir / "metrics.jsonl"
    texts = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    lines = [line for line in map(_line, texts) if line is not None]
    return _Run(workdir, config, lines, len(texts) - len(lines), sorted(_by_step(workdir / "checkpoints")))


def _line(text):
    """A line of metrics.jsonl, None if it is not whole."""
    try:
        line = json.loads(text)
        return line if isinstance(line["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _by_step(folder, suffix=""):
    """{step: path} of what is named by a step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(path.stem): path for path in paths if path.stem.isdecimal() and path.suffix == suffix}


def _flatten(values, prefix=""):
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------- sections


def _facts(run):
    planned, batch_size = run.get("train.num_steps"), run.get("train.batch_size")
    source = [run.get(key) for key in ("data.source", "data.path")]
    shape = [run.get(key) for key in ("data.image_size", "data.image_size", "data.channels")]
    rows = {
        "step": f"{_cell(run.step)} of {_cell(planned)}",
        "checkpoints": list(run.checkpoints) or None,
        "parameters": _num_parameters(run.workdir),
        "data": [" ".join(map(str, filter(None, source))), " × ".join(map(str, shape))] if all(shape) else None,
        "images seen": run.step * batch_size if _is_number(batch_size) else None,
    }
    if run.lines:
        loss, speed = (_finite(run, name) for name in ("loss", "images_per_second"))
        if len(loss):
            rows["loss"] = f"{_cell(loss[-1])}, least {_cell(loss.min())}"
        if len(speed):
            rows["images per second"] = f"{np.median(speed[-RECENT:]):,.4g}"
        rows["time of the steps"] = _time(run)
    return _table((rows | _dates(run)).items())


def _num_parameters(workdir):
    """From the shapes alone; None where this version cannot make the model of that config."""
    with contextlib.suppress(Exception):  # whatever a config of another version makes of it
        return sum(
            math.prod(x.shape) for x in jax.tree.leaves(parts.build(read_config(workdir)).abstract_state().params)
        )


def _finite(run, name):
    _, y = _series(run.lines, name)
    return y[np.isfinite(y)]


def _time(run):
    """Of all steps, by the speed of each line."""
    steps, speed = _series(run.lines, "steps_per_second")
    seconds = np.nansum(np.diff(steps, prepend=0) / np.where(speed > 0, speed, np.nan))
    return str(datetime.timedelta(seconds=round(float(seconds)))) if seconds else None


def _dates(run):
    """Of the first start, which TensorBoard's files have in their names, and of the last line."""
    names = [path.name.split(".") for path in run.workdir.glob("events.out.tfevents.*")]
    starts = [int(parts[3]) for parts in names if parts[3].isdecimal()]
    metrics = run.workdir / "metrics.jsonl"
    return {
        "first started": _date(min(starts)) if starts else None,
        "last line of metrics": _date(metrics.stat().mtime) if run.lines else None,
    }


def _date(seconds):
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _curves(run):
    if not run.lines:
        return _missing("There are no metrics yet (metrics.jsonl).")
    present = list(dict.fromkeys(name for line in run.lines for name in line if _is_number(line[name])))
    known = {name for _, names, _ in CHARTS for name in names} | set(NOT_DRAWN)
    charts = [*CHARTS, *((name, (name,), None) for name in present if name not in known)]
    figures, group = [], len(run.lines) // MEANS if len(run.lines) > MANY else 1
    for title, names, log in charts:
        series = {_label(name, run): _series(run.lines, name) for name in names if name in present}
        if series:
            figures.append(_chart(title, "step", series, log, group))
    notes = []
    if group > 1:
        notes.append(f"The strong lines are means of {group} values each, the faint ones the values.")
    if run.damaged:
        notes.append(f"Lines of metrics.jsonl that are damaged and left out: {run.damaged}.")
    return "\n".join([_side_by_side(figures), *map(_missing, notes)])


def _series(lines, name):
    """(steps, values) of the lines that have `name`; NaN for null."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    pairs = np.array([(step, y if _is_number(y) else np.nan) for step, y in found], float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _label(name, run):
    """The steps of which loss_t1 … loss_t4 are."""
    num_steps = run.get("schedule.num_steps")
    if not (name.startswith("loss_t") and name[6:].isdecimal() and _is_number(num_steps)):
        return name
    first, last = (-(-i * num_steps // 4) for i in (int(name[6:]) - 1, int(name[6:])))
    return f"t = {first + 1:,} … {last:,}"


def _samples(run):
    grids = _by_step(run.workdir / "samples", ".png")
    if not grids:
        return _missing("There are no grids of samples yet (samples/).")
    steps = sorted(grids)
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(GRIDS, len(steps))).round().astype(int))
    note = f"<p>{len(chosen)} of {len(steps)} grids.</p>\n" if len(chosen) < len(steps) else ""
    return note + _side_by_side([_picture(grids[steps[i]], f"step {steps[i]:,}") for i in chosen])


def _evaluation(run):
    folders = _by_step(run.workdir / "evaluation")
    if not folders:
        return _missing("There is no evaluation yet (evaluation/).")
    step = max(folders)
    file = folders[step] / "evaluation.json"
    parts = [f"<p>Of step {step:,}.</p>"]
    try:
        if file.exists():
            values = json.loads(file.read_text())
            parts += _values("", {"": values if isinstance(values, dict) else {"value": values}}, 3)
        else:
            parts.append(_missing(f"It has no numbers (evaluation/{step}/evaluation.json)."))
    except ValueError:
        parts.append(_missing(f"evaluation/{step}/evaluation.json is not JSON: its numbers are left out."))
    pictures = sorted(folders[step].glob("*.png"))
    if not pictures:
        parts.append(_missing(f"It has no pictures (evaluation/{step}/*.png)."))
    return "\n".join([*parts, _side_by_side([_picture(path, path.name, "wide") for path in pictures])])


def _config(run):
    """All keys with their exact values."""
    groups = {}
    for key, value in _flatten(run.config).items():
        text = value if isinstance(value, str) and value else json.dumps(value)
        groups.setdefault(key.split(".")[0], []).append((key, text))
    return _side_by_side([_table(rows) for rows in groups.values()])


# ---------------------------------------------------------------- nested values


def _values(title, columns, level):
    """Yields headings, tables and charts of {column: dict}: a row of a table for each key, a chart for each long list.

    A dict whose values are dicts with a key in common is a table with a column for each of them.
    """
    if len(columns) == 1:
        (only,) = columns.values()
        if _alike(only):
            columns = only
    if title:
        yield f"<h{level}>{_text(title)}</h{level}>"
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    nested = [key for key in keys if any(isinstance(column.get(key), dict) for column in columns.values())]
    drawn = [key for key in keys if any(_is_long(column.get(key)) for column in columns.values())]
    plain = [key for key in keys if key not in nested + drawn]
    rows = [(key, *(column.get(key) for column in columns.values())) for key in plain]
    if rows:
        yield _table(rows, head=("", *columns) if list(columns) != [""] else None)
    if drawn:
        yield _side_by_side(_charts_of_lists(columns, drawn))
    for key in nested:
        inner = {name: column[key] for name, column in columns.items() if isinstance(column.get(key), dict)}
        yield from _values(key, inner, min(level + 1, 6))


def _alike(values):
    dicts = list(values.values())
    if len(dicts) < 2 or not all(isinstance(value, dict) for value in dicts):
        return False
    return bool(set.intersection(*map(set, dicts)))


def _is_long(value):
    """A list to be drawn: numbers, null for a gap."""
    return isinstance(value, list) and len(value) > LONG and all(x is None or _is_number(x) for x in value)


def _charts_of_lists(columns, keys):
    """Each list over the list "t" or "step", or the first one; distortion over rate too."""
    over = next((key for key in ("t", "step") if key in keys), keys[0])
    pairs = [(over, key) for key in keys if key != over] or [("index", over)]
    if {"rate", "distortion"} <= set(keys) and over not in ("rate", "distortion"):
        pairs.append(("rate", "distortion"))
    charts = []
    for x_name, y_name in pairs:
        lists = {name: column[y_name] for name, column in columns.items() if _is_long(column.get(y_name))}
        over = {name: columns[name].get(x_name) for name in lists}
        if not all(_is_long(over[name]) and len(over[name]) == len(y) for name, y in lists.items()):
            x_name, over = "index", {name: range(len(y)) for name, y in lists.items()}
        series = {name or y_name: (np.array(over[name], float), np.array(y, float)) for name, y in lists.items()}
        charts.append(_chart(f"{y_name} over {x_name}", x_name, series))
    return charts


# ---------------------------------------------------------------- a chart


def _chart(title, x_name, series, log=None, group=1):
    """Lines of `series` {name: (x [n], y [n])} as a figure; where y is not finite a line has a gap.

    Args:
      log: the y axis shows ratios, if all y are above 0; None: if they are unlike.
      group: how many values of a line a mean is drawn of; 1: no means.
    """
    series = {name: (x, np.where(np.isfinite(x), y, np.nan)) for name, (x, y) in series.items()}
    x_all, y_all = (np.concatenate([each[i] for each in series.values()]) for i in (0, 1))
    x_all, y_all = x_all[np.isfinite(x_all)], y_all[np.isfinite(y_all)]
    if not len(y_all):
        return f"<figure><figcaption>{_text(title)}</figcaption>{_missing('No finite value.')}</figure>"
    log = bool(y_all.min() > 0 and (y_all.max() > 50 * y_all.min() if log is None else log))
    axes = _linear_axis(x_all, 5, tight=True), _log_axis(y_all) if log else _linear_axis(y_all, 5)
    described = "; ".join(f"{name} {_described(x, y, x_name)}" for name, (x, y) in series.items())
    scale = " <small>log scale</small>" if log else ""
    return "\n".join(
        [
            f"<figure>\n<figcaption>{_text(title)}{scale}</figcaption>",
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(f"{title}: {described}")}">',
            *_frame(*axes, x_name),
            *_lines(*axes, series.values(), group),
            f"</svg>\n{_legend(series, last=x_name == 'step')}\n</figure>",
        ]
    )


def _legend(series, last):
    """The names of the lines, and the last value of each if `last`."""
    items = []
    for i, (name, (_, y)) in enumerate(series.items()):
        finite = y[np.isfinite(y)]
        value = f" <b>{finite[-1]:,.4g}</b>" if last and len(finite) else ""
        items.append(f'<li><i class="s{i % COLOURS}"></i>{_text(name)}{value}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Axis(NamedTuple):
    low: float
    high: float
    ticks: list
    log: bool = False

    def at(self, values, start, end):
        """The places of `values` between `start` and `end`, where `low` and `high` are."""
        low, high, values = (np.log10(x) if self.log else np.asarray(x) for x in (self.low, self.high, values))
        return start + (end - start) * (values - low) / (high - low)

    def labels(self):
        """The ticks in letters."""
        small = not self.log and max(map(abs, self.ticks)) < 1e-3
        return [_number(tick, scientific=small and tick != 0) for tick in self.ticks]


def _linear_axis(values, num, tight=False):
    """About `num` round ticks; the axis ends with the values if `tight`, else with a tick, 0 where that is near."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    elif not tight and 0 < low < high / 2:
        low = 0.0
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= raw * 0.999)
    first, last = (math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
    if not tight:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    return _Axis(low, high, [i * step for i in range(first, last + 1)])


def _log_axis(values):
    """Ticks at powers of ten, or between them if those are few."""
    low, high = float(values.min()), float(values.max())
    margin = (high / low) ** 0.05 if high > 1.001 * low else 1.5
    low, high = low / margin, high * margin
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return _Axis(low, high, ticks[:: -(-len(ticks) // 7)], log=True)
    return _Axis(low, high, _linear_axis(np.array([low, high]), 4, tight=True).ticks, log=True)


def _frame(horizontal, vertical, x_name):
    """Yields the grid, the axis, their numbers and the name of x."""
    for y, label in zip(vertical.at(vertical.ticks, BOTTOM, TOP), vertical.labels(), strict=True):
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="y" x="{LEFT - 7}" y="{y + 4:.1f}">{label}</text>'
    for x, label in zip(horizontal.at(horizontal.ticks, LEFT, RIGHT), horizontal.labels(), strict=True):
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 5}"/>'
        yield f'<text class="x" x="{x:.1f}" y="{BOTTOM + 18}">{label}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
    yield f'<text class="x" x="{(LEFT + RIGHT) / 2:.1f}" y="{BOTTOM + 34}">{_text(x_name)}</text>'


def _lines(horizontal, vertical, series, group):
    """Yields the lines: where there are means, first all values, faint, and the means over them."""
    faint, strong = [], []
    for i, (x, y) in enumerate(series):
        kind, (x_means, y_means) = f"s{i % COLOURS}", _means(x, y, group)
        if group > 1 and np.isfinite(y_means).any():
            faint += _line_of(horizontal.at(x, LEFT, RIGHT), vertical.at(y, BOTTOM, TOP), f"{kind} faint")
            x, y = x_means, y_means
        strong += _line_of(horizontal.at(x, LEFT, RIGHT), vertical.at(y, BOTTOM, TOP), kind)
    yield from faint + strong


def _means(x, y, group):
    """Means over `group` neighbours; NaN where one of them is."""
    whole = len(y) // group * group
    return (values[:whole].reshape(-1, group).mean(axis=1) for values in (x, y))


def _line_of(x, y, kind):
    """Yields a polyline for each stretch without a gap; a dot if it is a single point."""
    finite = np.isfinite(y)
    edges = np.flatnonzero(np.diff(finite, prepend=False, append=False))
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(x[first:stop], y[first:stop], strict=True)]
        if len(points) > 1:
            yield f'<polyline class="{kind}" points="{" ".join(points)}"/>'
        else:
            yield f'<circle class="{kind}" cx="{x[first]:.1f}" cy="{y[first]:.1f}" r="2.5"/>'


def _described(x, y, x_name):
    """What those who do not see the line are told."""
    finite = np.isfinite(y)
    if not finite.any():
        return "no finite value"
    x, y = x[finite], y[finite]
    ends = [f"{_cell(float(y[i]))} at {x_name} {_cell(float(x[i]))}" for i in (0, -1)]
    return f"from {ends[0]} to {ends[1]}, least {_cell(float(y.min()))}, greatest {_cell(float(y.max()))}"


# ---------------------------------------------------------------- pieces of HTML


def _table(rows, head=None):
    """Of (name, *values)."""
    lines = ['<div class="table"><table>']
    if head:
        lines.append("<thead><tr>" + "".join(f'<th scope="col">{_text(name)}</th>' for name in head) + "</tr></thead>")
    lines.append("<tbody>")
    for name, *values in rows:
        cells = "".join(f"<td>{_cell(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{_text(name)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _picture(path, caption, kind="grid"):
    """A PNG inside the page; a "wide" one has a row of its own."""
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        return _missing(f"{path.name} is no PNG: it is left out.")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    data = base64.b64encode(content).decode()
    size = f'width="{width}" height="{height}"'
    return (
        f'<figure class="{kind}"><img alt="{_text(path.name)}" {size} src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _side_by_side(figures):
    return '<div class="figures">\n' + "\n".join(figures) + "\n</div>" if figures else ""


def _missing(text):
    return f'<p class="missing">{_text(text)}</p>'


def _cell(value):
    """A value of a table, escaped."""
    if value is None:
        return "–"
    if _is_number(value):
        return _number(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return _text(json.dumps(value))


def _number(value, scientific=False):
    if isinstance(value, int):
        return f"{value:,}"
    if math.isfinite(value) and value and (scientific or not 1e-4 <= abs(value) < 1e7):
        return np.format_float_scientific(float(f"{value:.4g}"), trim="-", exp_digits=1)
    return f"{value:,.5g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"


def _text(value):
    return html.escape(str(value))


PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fff; --front: #1b1f24; --pale: #596068; --rule: #e3e6ea;
  --s0: #1f6fb4; --s1: #c2410c; --s2: #15803d; --s3: #9333a8; --s4: #8a6d00; --s5: #0f766e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --front: #e4e7eb; --pale: #a0a8b2; --rule: #30363d;
    --s0: #6cb2f0; --s1: #f59e6c; --s2: #5fca86; --s3: #d79bea; --s4: #e0c04c; --s5: #5cc9bd; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 90rem; background: var(--back); color: var(--front);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .8rem; padding-bottom: .2rem; border-bottom: 1px solid var(--rule); }
h3, h4, h5, h6 { margin: 1.5rem 0 .6rem; font-size: 1.15em; }
h4, h5, h6 { font-size: 1em; }
a { color: var(--s0); }
nav { display: flex; flex-wrap: wrap; gap: 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { margin: .2rem 0; font-weight: 500; overflow-wrap: anywhere; }
small { color: var(--pale); font-weight: 400; }
img { display: block; max-width: 100%; height: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--pale); font-size: 12px; font-variant-numeric: tabular-nums; }
text.x { text-anchor: middle; }
text.y { text-anchor: end; }
line.grid { stroke: var(--rule); }
line.axis { stroke: var(--pale); }
polyline { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
polyline.faint { stroke-opacity: .25; stroke-width: .6; }
circle { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; margin: 0; padding: 0; list-style: none; font-size: .9em; }
.legend i { display: inline-block; width: 1.2em; height: .2em; margin-right: .4em; vertical-align: middle;
  background: currentColor; }
.table { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
tbody th { font-weight: 400; color: var(--pale); white-space: nowrap; }
.missing, footer { color: var(--pale); }
footer { margin-top: 2.5rem; font-size: .9em; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<nav aria-label="Sections">
$links
</nav>
</header>
<main>
$body
</main>
<footer>Written $date by diffusion_jax.</footer>
</body>
</html>
""")
