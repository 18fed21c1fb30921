"""How Sphinx builds these pages: `make docs`. Warnings are errors there."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from factor_transfer import __version__

project = "factor-transfer"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings with Args, Returns and Raises
    "cyclopts.ext.sphinx",  # every command and setting, as the command line has them
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_show_copyright = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "text"
html_math_renderer = "mathml"
smartquotes = False  # --flags stay as they are

default_role = "literal"  # docstrings write `code`
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_rtype = False


def outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to the README become plain text: it is no page here. (tests/test_docs.py follows them.)"""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./README\.md[^)]*\)", r"\1", source[0])


def mathml(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Equations as MathML, which browsers draw by themselves: Sphinx's own way fetches a script from elsewhere."""
    drawn = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    writer.body.append(drawn.replace("<math", '<math style="overflow: visible"', 1))  # no scroll bar
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", outside)
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
