import ast
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tools import mutate, notebooks

TESTS = pathlib.Path(__file__).parent
EVERY = [(name, language) for name in notebooks.names() for language in notebooks.languages(name)]
MOST_BYTES = 1_000_000
PATH_OF_A_MACHINE = re.compile(r"/tmp/|/home/|/root/|/Users/|/var/|/content/|[A-Z]:\\\\")


def committed(name, language):
    """Returns the cells of a notebook of this checkout."""
    return json.loads(notebooks.path(name, language).read_text())["cells"]


def test_blocks_of_python_are_cells_and_the_text_between_belongs_to_its_language():
    prose = "both\n<!-- en -->\none\n<!-- zh -->\n一\n<!-- all -->\n$x$\n\n"
    text = prose + "```python\na = 1\n\nb\n```\n\n```py\nno cell\n```\n"
    code, last = ("code", "a = 1\n\nb"), ("markdown", "```py\nno cell\n```")
    assert notebooks.parse(text, "en") == [("markdown", "both\n\none\n\n$x$"), code, last]
    assert notebooks.parse(text, "zh") == [("markdown", "both\n\n一\n\n$x$"), code, last]


def test_outputs_are_cleaned_and_noise_is_an_error():
    def stream(name, text):
        return {"output_type": "stream", "name": name, "text": text}

    bar = stream("stderr", "\rtraining:  50%|####  | 5/10 [00:01<00:01]\n")
    printed, more = stream("stdout", "in /somewhere/runs\n"), stream("stdout", "and on")
    picture = {"output_type": "display_data", "data": {"image/png": "p", "image/jpeg": "j"}}
    expected = [stream("stdout", "in ./runs\nand on"), {"output_type": "display_data", "data": {"image/png": "p"}}]
    assert notebooks.cleaned([printed, bar, more, picture], "code", "/somewhere") == expected
    with pytest.raises(ValueError, match="a cell writes to stderr: UserWarning: no"):
        notebooks.cleaned([stream("stderr", "UserWarning: no\n")], "code", "/somewhere")


@pytest.mark.parametrize("name", ["essay", "quickstart"])
def test_two_languages_have_the_same_code(name):
    assert notebooks.languages(name) == ["en", "zh"]
    english, chinese = (
        [(cell["source"], cell["outputs"]) for cell in committed(name, language) if cell["cell_type"] == "code"]
        for language in ("en", "zh")
    )
    assert len(english) > 10 and english == chinese
    assert len(committed(name, "en")) == len(committed(name, "zh"))


@pytest.mark.parametrize("name, language", EVERY)
def test_notebooks_are_what_their_sources_say(name, language):
    """After a change of a source: python -m tools.notebooks <name>."""
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in committed(name, language)]
    assert found == notebooks.cells(name, language)


@pytest.mark.parametrize("name, language", EVERY)
def test_outputs_are_whole_and_of_no_machine(name, language):
    assert notebooks.path(name, language).stat().st_size < MOST_BYTES
    code = [cell for cell in committed(name, language) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data", "execute_result")
        assert output.get("name") != "stderr"
        texts = {key: value for key, value in output.get("data", {}).items() if key != "image/png"}
        text = json.dumps([output.get("text"), texts])
        assert not PATH_OF_A_MACHINE.search(text) and " at 0x" not in text, text


def test_tests_that_the_essay_names_exist():
    texts = [file.read_text() for file in TESTS.rglob("*.py")]
    known = {test for text in texts for test in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    named = re.findall(r"`(test_\w+)`", notebooks.source("essay"))
    assert len(named) > 20 and set(named) <= known


def test_the_mistakes_of_the_essay_are_mutants():
    """So the gate shows that the tests catch them."""
    codes = [code for kind, code in notebooks.parse(notebooks.source("essay"), "en") if kind == "code"]
    calls = [node for code in codes for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    planted = [[ast.unparse(node) for node in call.args] for call in calls if ast.unparse(call.func) == "mistaken"]
    mutants = [(function.split(".")[0], *map(ast.literal_eval, texts)) for function, *texts in planted]
    assert len(mutants) >= 12 and set(mutants) <= set(itertools.chain(*mutate.MUTANTS.values()))


@pytest.mark.parametrize("name", notebooks.names())
def test_what_the_cells_import_exists(name):
    codes = [code for kind, code in notebooks.parse(notebooks.source(name), "en") if kind == "code"]
    nodes = [node for code in codes for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, alias.name) for node in nodes for alias in node.names if node.module.startswith("diffusion")]
    assert ours
    for module, attribute in ours:
        exec(f"from {module} import {attribute}", {})


@pytest.mark.slow
@pytest.mark.parametrize("name", notebooks.names())
def test_notebooks_run(name):
    """Each cell twice, in another folder, in a kernel in which absl has parsed the flags."""
    command = [sys.executable, "-m", "tools.notebooks", "--check", name]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=notebooks.ROOT, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
