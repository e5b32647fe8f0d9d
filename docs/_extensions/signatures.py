"""Signatures of many lines: Sphinx writes them as lists of definitions without a term."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

_OPENS = '<span class="sig-paren">(</span>\n\n<dl'


def _is_no_list(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Says so to screen readers."""
    if "body" in context:
        context["body"] = context["body"].replace(_OPENS, _OPENS + ' role="presentation"')


def setup(app: Sphinx) -> dict[str, bool]:
    """Goes over each page when it is written."""
    app.connect("html-page-context", _is_no_list)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
