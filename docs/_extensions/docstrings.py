"""Turns the library's docstrings into reStructuredText, before napoleon reads their sections.

They are plain text in Google style. A paragraph that is indented below its text is an equation and is shown as it is
written. Elsewhere, signs of an equation that reStructuredText would take for markup are escaped.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

_HEADING = re.compile(r"([A-Z][\w` ]*?)(?:, ([^:]*))?:")
_CODE = re.compile(r"(`[^`]*`)")
_MARKUP = re.compile(r"\*(?!\w[\w -]*\*)(?<!\w\*)|\||(?<=\w)_(?!\w)")
_PAGE = re.compile(r"\bdocs/([\w/-]+)\.md\b")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # napoleon's is 500
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    result = vars(inspect.getmodule(obj)).get(obj.__annotations__.get("return")) if inspect.isfunction(obj) else None
    fields = getattr(result, "_fields", ())
    lines[:] = (_of_fields(line, fields) for line in restructured(lines))


def restructured(lines: list[str]) -> Iterator[str]:
    """The lines of a docstring as reStructuredText with the sections that napoleon reads."""
    section, margin, equation, above = "", 0, False, ""
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        indent = len(line) - len(line.lstrip())
        heading = _HEADING.fullmatch(line)
        if heading and below.startswith("    "):
            section, margin, equation = heading[1], 4, False
            yield f"{section}:"
            if heading[2]:  # "Expected gradient, times 1 / temperature:"
                yield f"    {heading[2][0].upper()}{_escaped(heading[2][1:])}:"
                yield ""
        elif section == "Example":
            yield line
        elif line and indent >= margin + 4 and (equation or not above):
            if not equation:
                yield from (" " * margin + "::", "")
            equation = True
            yield line
        else:
            equation = equation and not line
            yield _escaped(line)
        above = line


def _of_fields(line: str, fields: tuple[str, ...]) -> str:
    """`reverse_kl` is a function, and a field of `LossOutput`: where a function returns it, the field is meant."""
    return _CODE.sub(lambda code: f"`{code[0]}`" if code[0].strip("`") in fields else code[0], line)


def _escaped(line: str) -> str:
    """Signs that are no markup, escaped outside of code; paths of pages as links."""
    parts = _CODE.split(line)
    parts[::2] = (_PAGE.sub(r":doc:`docs/\1.md </\1>`", _MARKUP.sub(r"\\\g<0>", part)) for part in parts[::2])
    return "".join(parts)
