"""Holds that the built site needs no network: no page loads a script, style, font or picture from an address."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_TAGS = re.compile(r"<(?:script|link|img|iframe|source|object|embed|use)\b[^>]*?(?:https?:)?//[^>]*>", re.IGNORECASE)
_IMPORTS = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^\s)]*", re.IGNORECASE)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True}


def _check(app: Sphinx, failure: Exception | None) -> None:
    if failure is None and app.builder.format == "html":
        for found in sorted(remote(Path(app.outdir))):
            logging.getLogger("sphinx.offline").error("loaded from the network: %s", found)
            app.statuscode = 1


def remote(site: Path) -> set[str]:
    """What the files of a site load from an address, as "file: tag"."""
    found = set()
    for pattern, expression in (("*.html", _TAGS), ("*.css", _IMPORTS)):
        for path in site.rglob(pattern):
            found |= {f"{path.relative_to(site)}: {tag}" for tag in expression.findall(path.read_text("utf-8"))}
    return found
