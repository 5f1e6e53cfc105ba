"""Links from a page to files outside docs/: to the address in pyproject.toml, or code while that is empty."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("source_address", "", "env", str)
    app.add_transform(_SourceLinks)
    return {"parallel_read_safe": True}


class _SourceLinks(SphinxTransform):
    default_priority = 400  # before a file that is linked would be copied into the site

    def apply(self, **options: Any) -> None:
        docs = Path(self.env.srcdir)
        here = docs / Path(self.env.docname).parent
        for kind in (addnodes.download_reference, addnodes.pending_xref):
            for link in list(self.document.findall(kind)):
                if link.get("refdomain") != "py":
                    target = link["reftarget"].partition("#")[0]  # of a page without its suffix, and absolute
                    path = os.path.relpath(here / target, docs)
                    if path.startswith(".."):
                        page = ".md" if os.path.isabs(target) else ""
                        link.replace_self(self._shown(link, os.path.relpath(here / target, docs.parent) + page))

    def _shown(self, link: nodes.Element, path: str) -> nodes.Node:
        if not self.config.source_address:
            return nodes.literal(text=link.astext())
        return nodes.reference("", "", *link.children, refuri=self.config.source_address + path, internal=False)
