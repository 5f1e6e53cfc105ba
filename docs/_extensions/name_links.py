"""On index pages and in tables of API pages, code that is the name or call of a public function links to its entry."""

from __future__ import annotations

import pkgutil
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import kdloss
import kdloss.integrations
import kdloss.testing

_PAGES = ("api/index", "migration", "papers")  # elsewhere `reverse_kl` may be the field of a result
_ENTRIES = {
    **{name: f"kdloss.testing.{name}" for name in kdloss.testing.__all__},
    **{name: f"kdloss.{name}" for name in kdloss.__all__ if name not in ("config", "schedules")},
    **{f"schedules.{name}": f"kdloss.schedules.{name}" for name in ("constant", "linear_floor", "cosine", "switch")},
}
_MODULES = {
    "strategies": "kdloss.testing.strategies",
    **{x.name: f"kdloss.integrations.{x.name}" for x in pkgutil.iter_modules(kdloss.integrations.__path__)},
}


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(_NameLinks)
    return {"parallel_read_safe": True}


def _entry(code: str) -> str | None:
    name = re.split(r"[(\s]", code)[0]
    module, _, member = name.partition(".")
    return f"{_MODULES[module]}.{member}" if module in _MODULES else _ENTRIES.get(name)


class _NameLinks(SphinxTransform):
    default_priority = 400

    def apply(self, **options: Any) -> None:
        parts = [self.document] if self.env.docname in _PAGES else []
        if not parts and self.env.docname.startswith("api/"):
            parts = list(self.document.findall(nodes.table))[:1]  # at the head of the page
        for code in [code for part in parts for code in part.findall(nodes.literal)]:
            if (entry := _entry(code.astext())) and not isinstance(code.parent, nodes.reference):
                link = addnodes.pending_xref("", code.deepcopy(), refdomain="py", reftype="obj", reftarget=entry)
                code.replace_self(link)
