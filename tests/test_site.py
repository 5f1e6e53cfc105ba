"""Holds the pages under docs/ together: entries, tables of names, toctrees, links and pictures. Needs no Sphinx.

`make docs` builds the site and fails for every warning; `tests/test_docstrings.py` holds what an entry shows.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdloss
import kdloss.testing
from kdloss import schedules

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "examples" not in page.relative_to(DOCS).parts)
FENCE = re.compile(r"^(`{3,})(.*?)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
FUNCTIONS = {name: x for name in kdloss.__all__ if inspect.isfunction(x := getattr(kdloss, name))}


def table_rows(page: str) -> list[list[str]]:
    """The cells of every row of a page's tables, without the lines below their heads."""
    rows = re.findall(r"^\| (.*) \|$", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


# --- the API pages -------------------------------------------------------------------------------------------------


def defined(path: Path) -> Iterator[str]:
    """The public functions and classes that a file defines."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name


def public_names() -> list[str]:
    """Everything that a user may import, by its full name."""
    source = ROOT / "src" / "kdloss"
    files = [source / "schedules.py", source / "testing" / "strategies.py", *source.glob("integrations/[a-z]*.py")]
    modules = {path: ".".join(path.relative_to(source.parent).with_suffix("").parts) for path in files}
    names = [f"kdloss.{name}" for name in kdloss.__all__ if name not in ("config", "schedules")]
    names += [f"kdloss.testing.{name}" for name in kdloss.testing.__all__]
    return names + [f"{module}.{name}" for path, module in modules.items() for name in defined(path)]


def api_entries(page: Path) -> Iterator[str]:
    """What the autodoc directives of a page document, by its full name."""
    module = ""
    for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)$", page.read_text("utf-8"), re.MULTILINE):
        if directive == "currentmodule":
            module = name
        else:
            yield name if directive == "automodule" else f"{module}.{name}"


API_PAGES = [page for page in sorted((DOCS / "api").glob("*.md")) if page.stem != "index"]


def test_every_public_name_has_one_entry():
    assert Counter(entry for page in API_PAGES for entry in api_entries(page)) == Counter(public_names())


@pytest.mark.parametrize("page", API_PAGES, ids=lambda page: page.stem)
def test_a_page_begins_with_a_table_of_its_names(page):
    """Without Sphinx the directives show nothing."""
    tabled = Counter(name for row in table_rows(f"api/{page.name}") for name in re.findall(r"`([^`]+)`", row[1]))
    assert tabled == Counter(re.sub(r"^kdloss\.(testing\.|integrations\.)?", "", name) for name in api_entries(page))
    assert page.read_text("utf-8").index("\n| to ... |") < page.read_text("utf-8").index("```{eval-rst}")


# --- papers and names elsewhere ------------------------------------------------------------------------------------


def calls(cell: str) -> Iterator[ast.expr]:
    """The code of a cell as expressions."""
    for code in re.findall(r"`([^`]+)`", cell):
        yield ast.parse(code, mode="eval").body


def unknown(expression: ast.expr) -> list[str]:
    """The names and keywords of a call, or of a name alone, that kdloss does not have."""
    arguments = {name for function in FUNCTIONS.values() for name in inspect.signature(function).parameters}
    match expression:
        case ast.Call(func=ast.Name(id=name), keywords=keywords) if name in FUNCTIONS:
            parameters = inspect.signature(FUNCTIONS[name]).parameters
            return [f"{name}({keyword.arg}=)" for keyword in keywords if keyword.arg not in parameters]
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
            return [] if hasattr(getattr(kdloss, owner, None), name) else [f"{owner}.{name}"]
        case ast.Attribute(value=ast.Name(id="schedules"), attr=name):
            return [] if hasattr(schedules, name) else [f"schedules.{name}"]
        case ast.Name(id=name):
            return [] if hasattr(kdloss, name) or name in arguments else [name]
        case ast.Constant():
            return []  # the value of a keyword, beside its call
    return [ast.unparse(expression)]


@pytest.mark.parametrize("page", ["migration.md", "papers.md"])
def test_the_calls_of_a_table_exist(page):
    column = 1
    found = []
    for row in table_rows(page):
        if row[0] == "here":
            continue
        first_is_ours = page == "migration.md" and len(row) > 3  # the tables of tensors have their own order
        if first_is_ours and row[0].startswith(("`ref_logp`", "---")):
            continue
        cell = re.sub(r"=\"[^\"]*\"`", "`", row[0 if first_is_ours else column])  # `tail="bucket"`, an argument alone
        cell = re.sub(r"`(\w+)=\w+`", r"`\1`", cell)
        found += [name for call in calls(cell) for name in unknown(call)]
    assert found == []


def test_an_unknown_call_is_found():
    cell = "`kl_k9(logp)`, `kl_k1(logp, mask=m)`, `schedules.linear`, `no_such_argument`, `kl_k1(logp, loss_mask=m)`"
    wanted = ["kl_k9(logp)", "kl_k1(mask=)", "schedules.linear", "no_such_argument"]
    assert [name for call in calls(cell) for name in unknown(call)] == wanted


def test_every_paper_of_a_docstring_is_listed_with_its_call():
    sources = FUNCTIONS | {f"schedules.{name}": vars(schedules)[name] for name in ("linear_floor", "cosine")}
    cited = {
        (paper, name)
        for name, function in sources.items()
        for paper in ARXIV.findall((inspect.getdoc(function) or "").partition("Source:")[2])
    }
    listed: set[tuple[str, str]] = set()
    papers: list[str] = []
    for paper, call, *_ in table_rows("papers.md"):
        if not paper.startswith("the same") or ARXIV.search(paper):
            papers = ARXIV.findall(paper)
        listed |= {(number, name) for number in papers for name in re.findall(r"`([\w.]+)`", call)}
    assert len(cited) > 40
    assert sorted(cited - listed) == []


# --- toctrees and links --------------------------------------------------------------------------------------------


def toctree(page: Path) -> Iterator[Path]:
    for _, head, body in FENCE.findall(page.read_text("utf-8")):
        if head == "{toctree}":
            for line in body.splitlines():
                if line and not line.startswith(":"):
                    yield (page.parent / f"{line}.md").resolve()


def test_every_page_is_in_one_toctree():
    listed = Counter(entry for page in PAGES for entry in toctree(page))
    assert listed == Counter(page for page in PAGES if page != DOCS / "index.md")


def anchors(page: Path) -> set[str]:
    """The headings of a page, as a code host and the site make anchors of them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links and pictures of a page that lead to no file, or to no heading of one."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                found.append(target)
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
def test_every_relative_link_leads_somewhere(page):
    assert dead_links(page, page.read_text("utf-8")) == []


def test_a_dead_link_is_found():
    links = "[a](gone.md) [b](packing.md#gone) ![c](gone.svg) [d](packing.md#what-a-server-reports) [e](https://x.y)"
    assert dead_links(DOCS / "index.md", links) == ["gone.md", "packing.md#gone", "gone.svg"]


# --- pictures, and what a built page loads -------------------------------------------------------------------------


def test_every_picture_is_small_and_shown():
    shown = "".join(page.read_text("utf-8") for page in PAGES)
    pictures = [*DOCS.glob("*.svg"), *DOCS.glob("*.png")]
    assert {picture.name: picture.stat().st_size for picture in pictures if picture.stat().st_size > 100_000} == {}
    assert [picture.name for picture in pictures if f"({picture.name})" not in shown] == []


def test_a_page_that_loads_from_the_network_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS / "_extensions"), *sys.path])
    from offline import remote

    page, style = tmp_path / "page.html", tmp_path / "style.css"
    page.write_text('<a href="https://a.b">a</a> <script src="local.js"></script> <svg xmlns="http://w.org/svg"></svg>')
    style.write_text("/* https://a.b */ body { background: url(local.png) }")
    assert remote(tmp_path) == set()
    page.write_text('<script src="https://a.b/c.js"></script> <link href="//a.b/c.css"> <img src="https://a.b/c.png">')
    style.write_text("@import 'https://a.b/c.css'; x { src: url(https://a.b/c.woff) }")
    assert len(remote(tmp_path)) == 5
