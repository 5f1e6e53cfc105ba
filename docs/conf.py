"""Settings of the site, which `make docs` builds into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib

import kdloss

sys.path.append(str(Path(__file__).parent / "_extensions"))

# The project has no address yet. Until pyproject.toml has one, a link to a file outside docs/ becomes its text as code.
_project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
source_address = _project.get("urls", {}).get("Source", "")

project = "kdloss"
author = "The kdloss authors"
project_copyright = author
version = release = kdloss.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "docstrings",
    "name_links",
    "offline",
    "source_links",
]
exclude_patterns = ["examples"]
show_warning_types = True
nitpicky = True
# `name` in a docstring is a link if the site has an entry of that name, and code if it has none.
default_role = "py:obj"
# A full name must have an entry. Other names may be arguments, types of torch or aliases inside the library.
nitpick_ignore_regex = [("py:(class|data|exc)", ".*"), ("py:obj", r"(?!kdloss\.)[\s\S]*")]

myst_heading_anchors = 3
smartquotes_action = "D"  # dashes alone: shapes are (..., V), and options are "token_mean"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Attributes", "params_style"),
    "Expected gradient",
    "Gradient with `group`",
    "Source",
]
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "kdloss"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_search_scorer = str(Path(__file__).parent / "_extensions" / "search_scores.js")
html_show_sphinx = False
html_show_search_summary = False  # a summary is fetched, which a browser refuses to do for a page opened from a file
pygments_style = "friendly"
pygments_dark_style = "github-dark"
