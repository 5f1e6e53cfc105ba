"""On the pages that are indexes, code that is the name or the call of a public function links to its entry."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import kdloss
import kdloss.testing

_PAGES = ("api/index", "migration", "papers")  # elsewhere `reverse_kl` may be the field of a result
_ENTRIES = {
    **{name: f"kdloss.testing.{name}" for name in kdloss.testing.__all__},
    **{name: f"kdloss.{name}" for name in kdloss.__all__ if name not in ("config", "schedules")},
    **{f"schedules.{name}": f"kdloss.schedules.{name}" for name in ("constant", "linear_floor", "cosine", "switch")},
}


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(_NameLinks)
    return {"parallel_read_safe": True}


class _NameLinks(SphinxTransform):
    default_priority = 400

    def apply(self, **options: Any) -> None:
        for code in list(self.document.findall(nodes.literal)) if self.env.docname in _PAGES else ():
            entry = _ENTRIES.get(re.split(r"[(\s]", code.astext())[0])
            if entry and not isinstance(code.parent, nodes.reference):
                link = addnodes.pending_xref("", code.deepcopy(), refdomain="py", reftype="obj", reftarget=entry)
                code.replace_self(link)
