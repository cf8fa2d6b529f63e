"""Builds the notebooks from their sources, and executes them. Needs nbclient and ipykernel.

    python -m tools.notebooks [names]            executes notebooks/source/<name>.md, writes notebooks/<name>.ipynb
    python -m tools.notebooks --text [names]     writes them with the outputs that they have, after a change of text
    python -m tools.notebooks --check [names]    executes them under harder conditions and writes nothing

A source is a Markdown file. A block that opens with ```python at the start of a line is a code cell; the text between
two of them is a text cell. Text after a line <!-- en --> or <!-- zh --> belongs to that language alone, until the next
such line, <!-- all --> or code cell. A source with <!-- zh --> makes a second notebook, <name>.zh.ipynb. The code is
executed once and both get its outputs, so they cannot differ.

The kernel starts in an empty folder with this checkout on its path. Progress bars are left out of the outputs, and the
path of the folder becomes "."; anything else on stderr is an error. --check starts the kernel as a program that has
parsed its flags with absl would, executes each cell twice, and shortens it: SHORTER has the texts that it replaces.
"""

import argparse
import copy
import json
import os
import pathlib
import re
import sys
import tempfile
import tomllib
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
TIMEOUT = 3600  # seconds for a cell; a kernel has STARTUP to begin
STARTUP = 600
# What --check replaces: 20 steps of training, 60 of the essay's own loop, a network of one level without blocks on the
# way down, which compiles in less than half the time, chains of 100 steps, with the steps of the interpolation in them,
# and two samplers, weights and numbers of steps, each of which is a program of its own.
SHORTER = {
    re.compile(r"^config\.train\.num_steps = \d+$", re.MULTILINE): (
        "config.train.num_steps = 20\nconfig.schedule.num_steps = 100\n"
        "config.model.multipliers, config.model.num_res_blocks, config.model.attention_resolutions = (1,), 0, ()"
    ),
    re.compile(r"^steps = \[50, 150, 300\]$", re.MULTILINE): "steps = [5, 15, 30]",
    re.compile(r"^STEPS, BATCH = \d+", re.MULTILINE): "STEPS, BATCH = 60",
    re.compile(r"x_T\[:30\], keys\[:30\]\)"): "x_T[:30], keys[:30], stop=T - 100)",
    re.compile(r"multipliers=\(1, 2\), num_res_blocks=1, attention_resolutions=\(4,\)"): (
        "multipliers=(1,), num_res_blocks=0, attention_resolutions=()"
    ),
    re.compile(r'^    "(DDIM, 50|DPM-Solver\+\+, 10|all 1000)": \{.*\},\n', re.MULTILINE): "",
    re.compile(r"^counts = \(5, 10, 20, 50, 100, 200\)$", re.MULTILINE): "counts = (5, 10)",
    re.compile(r"^weights = \[0\.0, 1\.0, 1\.5, 3\.0\]$", re.MULTILINE): "weights = [0.0, 1.5]",
}
PARSED_FLAGS = "from absl import flags\n\nflags.FLAGS(['kernel'])"
PROGRESS = re.compile(r"\d+%\||\d+/\d+ \[| … \d\d:\d\d|^Moving |^\x1b\[A$")  # the last is between two bars

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
INSTALL = """\
# Finds the package: in a checkout around this folder, else installed, else from its repository.
import importlib.util
import pathlib
import sys

here = pathlib.Path.cwd()
checkout = [folder for folder in (here, *here.parents) if (folder / "diffusion_jax" / "schedule.py").exists()]
spec = importlib.util.find_spec("diffusion_jax")
if checkout:
    sys.path.insert(0, str(checkout[0]))
elif spec is None or spec.origin is None:
    %pip install --quiet git+{repository}"""

Cell = tuple[str, str]  # ("code" or "markdown", text)


def names() -> list[str]:
    """Returns the names of all sources."""
    return sorted(file.stem for file in (FOLDER / "source").glob("*.md"))


def source(name: str) -> str:
    """Returns the text of a source."""
    return (FOLDER / "source" / f"{name}.md").read_text()


def languages(name: str) -> list[str]:
    """Returns the languages of a source, English first."""
    return ["en", "zh"] if re.search(r"^<!-- zh -->$", source(name), re.MULTILINE) else ["en"]


def path(name: str, language: str) -> pathlib.Path:
    """Returns the notebook of a source in a language."""
    return FOLDER / (f"{name}.ipynb" if language == "en" else f"{name}.{language}.ipynb")


def cells(name: str, language: str) -> list[Cell]:
    """Returns the cells of a source in a language, with the badge and the cell that installs the package."""
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    file = path(name, language).relative_to(ROOT)
    url = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/{file}"
    title, *rest = parse(source(name), language)
    return [("markdown", BADGE.format(url=url)), title, ("code", INSTALL.format(repository=REPOSITORY)), *rest]


def parse(text: str, language: str) -> list[Cell]:
    """Returns the cells of the text of a source."""
    found: list[Cell] = []
    # Odd parts are the insides of code blocks.
    for i, part in enumerate(re.split(r"^```python\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)):
        if i % 2:
            found.append(("code", part))
            continue
        all_of_it, *marked = re.split(r"^<!-- (\w+) -->$", part, flags=re.MULTILINE)
        pieces = zip(["all", *marked[::2]], [all_of_it, *marked[1::2]], strict=True)
        prose = [piece.strip() for of, piece in pieces if of in (language, "all") and piece.strip()]
        if prose:
            found.append(("markdown", "\n\n".join(prose)))
    return found


def notebook(found: list[Cell], outputs: list[list[dict]]) -> Any:
    """Returns a notebook of the cells; `outputs` has the outputs of each code cell in turn."""
    from nbformat import from_dict, v4

    remaining, count = iter(outputs), 0
    nb = v4.new_notebook(metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}})
    nb.metadata["language_info"] = {"name": "python"}
    for i, (kind, text) in enumerate(found):
        if kind == "markdown":
            cell = v4.new_markdown_cell(text)
        else:
            count += 1
            cell = v4.new_code_cell(text, execution_count=count, outputs=from_dict(copy.deepcopy(next(remaining))))
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = count
        cell["id"] = f"cell-{i:02d}"  # random ones would differ in each build
        nb.cells.append(cell)
    return nb


def execute(codes: list[str], repeats: int = 1, prologue: str = "") -> list[list[dict]]:
    """Executes code cells in a new kernel and returns the outputs of each.

    Args:
      repeats: how often each cell is executed before the next.
      prologue: code that runs before the first cell.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an error.
      ValueError: a cell wrote to stderr.
    """
    from nbclient import NotebookClient
    from nbformat import v4

    in_turn = [prologue] * bool(prologue) + [code for code in codes for _ in range(repeats)]
    nb = v4.new_notebook(cells=[v4.new_code_cell(code) for code in in_turn])
    with tempfile.TemporaryDirectory() as folder:
        options = {"kernel_name": "python3", "timeout": TIMEOUT, "startup_timeout": STARTUP, "record_timing": False}
        quiet = ["--log-level=40"]  # the kernel warns that it talks over local TCP
        client = NotebookClient(nb, resources={"metadata": {"path": folder}}, extra_arguments=quiet, **options)
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        alarms = {"TF_CPP_MIN_LOG_LEVEL": "3"}  # XLA's, of compilations that are slow on a busy machine
        client.execute(env=os.environ | alarms | {"PYTHONPATH": python_path})
        done = nb.cells[bool(prologue) :][repeats - 1 :: repeats]
        return [cleaned(cell.outputs, cell.source, folder) for cell in done]


def cleaned(outputs: list[dict], code: str, folder: str) -> list[dict]:
    """Returns outputs as they are committed: without progress bars, the temporary folder and second copies of pictures.

    Text that a cell prints is one output, however often the kernel has sent some.

    Raises:
      ValueError: stderr has anything but progress bars.
    """
    kept: list[dict] = []
    for output in json.loads(json.dumps(outputs).replace(folder, ".")):
        if output.get("name") == "stderr":
            lines = [line for line in re.split(r"[\r\n]", output["text"]) if line.strip()]
            if noise := [line for line in lines if not PROGRESS.search(line)]:
                raise ValueError(f"a cell writes to stderr: {noise[0]}\n\n{code}")
        elif output.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
            kept[-1]["text"] += output["text"]
        else:
            if "image/png" in output.get("data", {}):
                output["data"].pop("image/jpeg", None)  # Pillow gives both
            kept.append(output)
    return kept


def written(name: str, codes: list[str]) -> list[list[dict]]:
    """Returns the outputs in the notebook of a source. Raises ValueError if its code is not `codes`."""
    import nbformat

    found = [cell for cell in nbformat.read(path(name, "en"), as_version=4).cells if cell.cell_type == "code"]
    if [cell.source for cell in found] != codes:
        raise ValueError("the code has changed: build it without --text")
    return [cell.outputs for cell in found]


def build(name: str, keep_outputs: bool = False) -> None:
    """Writes the notebook of a source in each language; executes it for the outputs, or keeps those that it has."""
    import nbformat

    codes = [code for kind, code in cells(name, "en") if kind == "code"]
    outputs = written(name, codes) if keep_outputs else execute(codes)
    for language in languages(name):
        nb = notebook(cells(name, language), outputs)
        nbformat.validate(nb)
        nbformat.write(nb, path(name, language))
        print(f"{path(name, language).relative_to(ROOT)}: {path(name, language).stat().st_size / 1e3:.0f} kB")


def check(name: str) -> None:
    """Executes each cell of a source twice, in a kernel in which absl has parsed the flags; trainings are short.

    Raises:
      ValueError: no cell holds a text that makes it shorter.
    """
    codes = [code for kind, code in cells(name, "en") if kind == "code"]
    shorter = codes
    for pattern, replacement in SHORTER.items():
        shorter = [pattern.sub(replacement, code) for code in shorter]
    if shorter == codes:
        raise ValueError("no cell holds one of the texts in SHORTER: its training would be whole")
    execute(shorter, repeats=2, prologue=PARSED_FLAGS)
    print(f"{name}: all cells run, twice each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of sources; default: all")
    parser.add_argument("--text", action="store_true", help="change text only, and keep the outputs")
    parser.add_argument("--check", action="store_true", help="execute only, under harder conditions")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names()):
        parser.error(f"{', '.join(sorted(unknown))}: the sources are {', '.join(names())}")
    for name in args.names or names():
        try:
            check(name) if args.check else build(name, args.text)
        except Exception as error:  # nbclient's error holds the traceback of the cell
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
