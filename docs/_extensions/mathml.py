"""Formulas as MathML, which browsers draw themselves: no script and nothing to fetch."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils import math
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def _mathml(node: nodes.Element, *, block: bool) -> str:
    text = node.astext().strip().replace(r"\dots", r"\ldots")
    text = re.sub(r"\\([bB]igg?)([(\[])", r"\\\1l\2", text)
    text = re.sub(r"\\([bB]igg?)([)\]])", r"\\\1r\2", text)
    if block and r"\\" in math.toplevel_code(text):
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    try:
        return latex2mathml.tex2mathml(text, as_block=block)
    except math.MathError as error:
        LOGGER.warning("no MathML for %r: %s", text, error, location=node)
        return ""


def visit_math(self, node: nodes.math) -> None:
    """Writes a formula in a line."""
    self.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def visit_displaymath(self, node: nodes.math_block) -> None:
    """Writes a formula that stands by itself; a wide one scrolls."""
    self.body.append(f'<div class="formula">{_mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the writer as `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
