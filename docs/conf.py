"""The site: guides, notebooks without running them, and a reference from the docstrings.

pip install .[docs] && sphinx-build -W -b html docs site
"""

import re

import diffusion_jax

project = "diffusion_jax"
author = "The diffusion_jax authors"
release = diffusion_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "notebooks/source"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]  # formulas of the notebooks
nb_execution_mode = "off"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes as a list: autodoc describes the fields of a class too
python_maximum_signature_line_length = 88
highlight_language = "text"

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):$")


def _to_rst(app, what, name, obj, options, lines):
    """Turns a docstring's plain text into reStructuredText, in place: code, symbols, and indented blocks."""
    result = []
    for line in lines:
        opens_block = line.startswith("    ") and result and not result[-1].strip()
        before = next((text for text in reversed(result) if text.strip()), "")
        if opens_block and not before.startswith(" ") and not _SECTION.match(before):
            result += ["::", ""]
        if line.startswith(" ") and _in_block(result):
            result.append(line)
            continue
        note = re.fullmatch(r"Args \((.*)\):", line)
        if note:
            result += [f"{note[1]}.", "", "Args:"]
            continue
        parts = re.split(r"`([^`]+)`", line)
        escaped = (f"``{part}``" if i % 2 else re.sub(r"([*|])", r"\\\1", part) for i, part in enumerate(parts))
        result.append("".join(escaped))
    lines[:] = result


def _in_block(lines):
    """Returns True if the last line that is not indented opens a literal block."""
    return next((line == "::" for line in reversed(lines) if line and not line.startswith(" ")), False)


def setup(app):
    """Connects the hook; napoleon, which reads the sections, comes after it."""
    app.connect("autodoc-process-docstring", _to_rst, priority=400)
