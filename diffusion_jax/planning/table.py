"""The tables of a plan, as Markdown."""

import math
from typing import Any

from diffusion_jax.planning import growth
from diffusion_jax.running.tables import markdown_table

SAMPLES = 50_000  # images in the FID of the literature
_MEMORY = ("arguments", "outputs", "aliased", "temporaries", "code")


def table(report: dict[str, Any]) -> str:
    """Returns a plan as Markdown."""
    train, chain = report["train"], report["sampling"]
    head = [
        f"{report['topology']}: {report['devices']:,} × {report['device']}, {report['parameters']:,} parameters, "
        f"{report['dtype']}"
    ]
    if classes := report.get("classes"):
        head.append(f"{classes:,} classes, sampled with guidance {report['guidance']:g}")
    if chip := report["chip"]:
        part = "chip" if chip["devices"] == 1 else f"device, of which a chip has {chip['devices']}"
        head.append(
            f"per {part}: {chip['flops'] / 1e12:g} TFLOP/s in bfloat16, {_bytes(chip['hbm'])} HBM at "
            f"{chip['bandwidth'] / 1e9:g} GB/s, links of {chip['links'] / 1e9:g} GB/s"
        )
    columns = ("", "train step", f"sampling chain, {chain['steps_per_image']:,} steps")
    lines = markdown_table(columns, [(name, text(train), text(chain)) for name, text in _rows(report)])
    return "\n".join([*head, "", *lines, "", *_notes(report)])


def _rows(report):
    """Returns [(name, program -> text)] for the rows of the table."""
    num, chip = report["devices"], report["chip"]
    rows = [
        ("images: all chips (one)", lambda p: f"{p['images_per_chip'] * num:,} ({p['images_per_chip']:,})"),
        ("FLOPs per image", lambda p: _flops(p["flops_per_image"])),
        ("FLOPs per chip and step", lambda p: _flops(p["per_chip"]["flops"])),
        ("HBM bytes per chip and step", lambda p: _bytes(p["per_chip"]["hbm_bytes"])),
        *((f"memory per chip: {key}", lambda p, key=key: _bytes(p["memory"][key])) for key in _MEMORY),
        ("memory per chip: peak", lambda p: _peak(p["memory"]["peak"], chip)),
        ("collectives per step", lambda p: _collectives(p["collectives"])),
        ("compile time, measured here", lambda p: f"{p['compile_seconds']:.0f} s"),
    ]
    if any(report[name]["optimal_seconds"] for name in ("train", "sampling")):
        rows.append(("the compiler's own estimate", lambda p: _time(p["optimal_seconds"])))
    if not chip:
        return rows
    return [
        *rows,
        ("estimate: FLOPs at the bf16 peak", lambda p: _time(p["roofline"]["compute_seconds"])),
        ("estimate: bytes at the HBM's bandwidth", lambda p: _time(p["roofline"]["memory_seconds"])),
        ("estimate: collectives over the links", lambda p: _time(p["roofline"]["links_seconds"])),
        ("estimate: time per step, at best", lambda p: _time(p["roofline"]["seconds"])),
        ("estimate: bound by", lambda p: p["roofline"]["bound"]),
        ("estimate: share of the bf16 peak", lambda p: f"{p['roofline']['utilisation']:.1%}"),
        ("estimate: hours, at best", lambda p: f"{_number(p['hours'])} ({p['num_steps']:,} steps)"),
        ("estimate: chip-hours, at best", lambda p: _number(p["chip_hours"])),
        ("estimate: US$ on demand (spot), at best", _dollars),
    ]


def _dollars(program):
    """Returns the price of a program of a report, e.g. "123 (25)"."""
    dollars = program["dollars"]
    return "unknown" if dollars is None else f"{_number(dollars['on_demand'])} ({_number(dollars['spot'])})"


def _notes(report):
    notes = [
        f"Sampling: {SAMPLES:,} images in all; the program is the whole chain.",
        "Aliased: outputs that reuse the memory of arguments.",
    ]
    if not report["chip"]:
        return [*notes, "No times: there is no roofline for this device."]
    return [
        *notes,
        "Estimates are max(FLOPs / bf16 peak, bytes / HBM bandwidth) + bytes sent / links. They are not measured: "
        "float32 has a lower peak, and input and output of data are not counted.",
        f"Estimate: about {report['largest_batch_per_chip']['estimate']:,} images a chip and train step fit, or more, "
        "if memory grows evenly with them.",
        _prices(report["price"]),
    ]


def _prices(price):
    if price is None:
        return "There is no price for this chip: --prices takes a file with one."
    return (
        f"Prices: {price['on_demand']:g} US$ for a chip and hour on demand, {price['spot']:g} as spot, in "
        f"{price['region']}, read on {price['read']} in {price['source']}; --prices takes other ones."
    )


def growth_table(report: dict[str, Any]) -> str:
    """Returns the train step on other numbers of devices; "" for a topology without a roofline."""
    if not report["growth"]:
        return ""
    rows = [
        (f"{x.devices:,}", f"{x.images:g}", _time(x.compute), _time(x.links), _time(x.seconds), f"{x.efficiency:.0%}")
        for x in (growth.Size(**size) for size in report["growth"])
    ]
    most = growth.Size(**report["pays"])
    columns = ("devices", "images of each", "computing", "links", "step", "efficiency")
    return "\n".join(
        [
            f"Estimate: the train step of {most.devices * most.images:,.0f} images on other numbers of devices:",
            "",
            *markdown_table(columns, rows),
            "",
            f"Devices keep at least half of their speed up to {most.devices:,} of them, with {most.images:g} images "
            "each. Memory is not looked at.",
        ]
    )


def comparison(reports: list[dict[str, Any]]) -> str:
    """Returns a table with a row for the training on each topology; a topology that was refused says why below it."""
    done = [report for report in reports if "refused" not in report]
    rows = [_row(report) for report in done]
    columns = ("topology", "chips", "images of each", "step, at best", "links", "hours", "chip-hours")
    lines = markdown_table((*columns, "US$ on demand", "US$ spot"), rows)
    refused = [f"{report['topology']}: {report['refused']}" for report in reports if "refused" in report]
    return "\n".join(["Estimates of the whole training:", "", *lines, "", *refused])


def _row(report):
    train, chip = report["train"], report["chip"]
    cells = (
        report["topology"],
        f"{report['chips']:,}",
        f"{report['devices'] * train['images_per_chip'] / report['chips']:g}",
    )
    if not chip:
        return (*cells, *["unknown"] * 6)
    times = (
        _time(train["roofline"]["seconds"]),
        f"{train['roofline']['links_seconds'] / train['roofline']['seconds']:.0%}",
    )
    dollars = [_number(train["dollars"][kind]) if train["dollars"] else "unknown" for kind in ("on_demand", "spot")]
    return (*cells, *times, _number(train["hours"]), _number(train["chip_hours"]), *dollars)


def _flops(value):
    """Returns e.g. "1.23 TFLOP" for 1.23e12."""
    power = min(max(int(math.log10(value)) // 3, 0), 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def _bytes(value):
    power = min(int(math.log2(value)) // 10, 4) if value >= 1 else 0
    return f"{value / 1024**power:.4g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds):
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _peak(value, chip):
    return _bytes(value) + (f", {value / chip['hbm']:.1%} of the HBM" if chip else "")


def _collectives(totals):
    return ", ".join(f"{entry['count']} {name} of {_bytes(entry['bytes'])}" for name, entry in totals.items()) or "none"
