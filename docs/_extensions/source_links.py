"""Links from a page to files outside docs/: to `source_address` of conf.py, or code while that is empty."""

from __future__ import annotations

import os
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
        here = os.path.dirname(self.env.docname)
        for kind in (addnodes.download_reference, addnodes.pending_xref):
            for link in list(self.document.findall(kind)):
                path = os.path.normpath(os.path.join("docs", here, link["reftarget"].partition("#")[0]))
                if link.get("refdomain") != "py" and not path.startswith("docs"):
                    link.replace_self(self._shown(link, path))

    def _shown(self, link: nodes.Element, path: str) -> nodes.Node:
        if not self.config.source_address:
            return nodes.literal(text=link.astext())
        return nodes.reference("", "", *link.children, refuri=self.config.source_address + path, internal=False)
