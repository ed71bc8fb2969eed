"""The documentation's Sphinx configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohypertunity

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "aiohypertunity"
author = "the aiohypertunity authors"
project_copyright = author
release = version = aiohypertunity.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"aiohypertunity {release}"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings mark code as Markdown does
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text of `Args` has what a reader needs; signatures stay short
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Types of other projects: their inventories would need a network at each build.
nitpick_ignore = [("py:class", "Path"), ("py:class", "T")]


def insert_figures(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace `<!-- figures: SUITE ... -->` in a page by the table of these suites' figures."""
    if docname != "performance":
        return
    app.env.note_dependency(str(HERE / "figures.json"))
    content = json.loads((HERE / "figures.json").read_text())
    text = source[0].replace("<!-- machine -->", content["machine"])

    def table(match: re.Match[str]) -> str:
        suites = match[1].split()
        return figure_table([row for row in content["rows"] if row["suite"] in suites])

    source[0] = re.sub(r"<!-- figures: ([\w ]+?) -->", table, text)


def figure_table(rows: list[dict[str, Any]]) -> str:
    """Return rows of the benchmark's JSON as a Markdown table."""
    lines = [
        "| figure | result | compared with | ratio | target | met |",
        "|---|---|---|---|---|---|",
    ]
    verdicts = {True: "yes", False: "**no**", None: "-"}
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        met = verdicts[row["met"]]
        cells = (row["figure"], row["ours"], row["against"], ratio, row["must_be"], met)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def name_bases(_app: Sphinx, _name: str, _value: type, _options: object, bases: list[Any]) -> None:
    """Name base classes as users import them, not by the module in which they are defined."""
    public = {getattr(aiohypertunity, name): name for name in aiohypertunity.__all__}
    bases[:] = [f":py:class:`{public[b]}`" if b in public else b for b in bases]


def setup(app: Sphinx) -> None:
    """Connect the hooks."""
    app.connect("source-read", insert_figures)
    app.connect("autodoc-process-bases", name_bases)
