"""The documents agree with each other: languages, links, the repository's address, and the site."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *GUIDES]

_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def skeleton(text):
    """Returns what two languages have in common, in order: headings, rows, items, links, names and commands."""
    result = []
    for block in re.split(r"(```.*?```)", text, flags=re.DOTALL):
        if block.startswith("```"):
            result.append(re.sub(r" *#.*", "", block))
            continue
        for match in re.finditer(r"^(#+|- )|^(\|.*)$|\]\(([^)]*)\)|(`[^`]+`)", block, re.MULTILINE):
            start, row, target, name = match.groups()
            result.append("|" * row.count("|") if row else start or target or name)
            result += re.findall(r"\]\(([^)]*)\)", row or "")
    return result


def test_both_languages_have_one_structure():
    english, chinese = (skeleton((ROOT / name).read_text()) for name in ("README.md", "README.zh.md"))
    ours = {"README.zh.md": "README", "README.md": "README"}
    assert [ours.get(part, part.replace(".zh.ipynb", ".ipynb")) for part in chinese] == [
        ours.get(part, part) for part in english
    ]


def test_numbers_are_the_same_in_both_languages():
    def numbers(name):
        text = re.sub(r"```.*?```|\]\([^)]*\)", "", (ROOT / name).read_text(), flags=re.DOTALL)
        return sorted(re.findall(r"\d+\.\d+", text.replace(",", "")))

    assert numbers("README.md") == numbers("README.zh.md") != []


def test_readme_is_short():
    assert all(len((ROOT / name).read_text().splitlines()) <= 120 for name in ("README.md", "README.zh.md"))
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


def anchors(text):
    """Returns the anchors of the headings of a page, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = _CODE.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{document.name} links to {target}"


def test_commands_name_flags_and_files_that_exist():
    """Looks up the configs, tools, modes and flags of every command in the documents."""
    from diffusion_jax import cli
    from diffusion_jax.commands import flags

    for document in [*DOCUMENTS, *sorted((ROOT / "docs" / "api").glob("*.md"))]:
        for line in re.findall(r"python (?:main\.py|-m (?:tools|benchmarks)\.\w+) [^\n`]*", document.read_text()):
            for config in re.findall(r"--config=(configs/\w+\.py)", line):
                assert (ROOT / config).exists(), f"{document.name}: {line}"
            for module in re.findall(r"-m ((?:tools|benchmarks)\.\w+)", line):
                assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{document.name}: {line}"
            if "main.py" in line:
                modes = re.findall(r"--mode=(\w+)", line)
                assert all(mode in cli.MODES for mode in modes), f"{document.name}: {line}"
                for flag in re.findall(r"--(\w+)", line.split(" > ")[0].split("' ")[0]):
                    known = flag.removeprefix("no") in flags.FLAGS or flag in flags.FLAGS
                    assert known or flag in ("mode", "config", "help"), f"{document.name}: --{flag}"


def test_one_address_of_the_repository():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == urls["Repository"]
    for document in DOCUMENTS:
        for url in re.findall(r"https://github\.com/\S*?/diffusion_jax", document.read_text()):
            assert url == urls["Repository"], document.name


def test_citation_has_the_version_of_the_package():
    import diffusion_jax

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == diffusion_jax.__version__
    assert [reference["year"] for reference in citation["references"]] == [2022, 2020]


def test_every_guide_is_on_the_site():
    listed = (ROOT / "docs" / "index.md").read_text()
    for guide in GUIDES:
        assert guide.stem == "index" or re.search(rf"^{guide.stem}$", listed, re.MULTILINE), guide.name


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    assert importlib.util.find_spec("furo"), "the site needs pip install -r requirements-docs.txt"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "reverse_chain" in (tmp_path / "api" / "core.html").read_text()
    essay = (tmp_path / "notebooks" / "essay.html").read_text()
    text = re.sub(r"(?s)<pre>.*?</pre>|<script.*?</script>", "", essay)
    assert essay.count('class="math') > 50 and "$" not in text  # no formula stays raw
