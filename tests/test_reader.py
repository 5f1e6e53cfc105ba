"""Holds README.md and docs/ to what a reader sees: no block needs a hidden one, no link is empty.

conftest.py and tests/trainers/test_pages.py run the blocks. Both leave out HTML comments, so a page that hides its
set-up fails there with the reader's NameError.
"""

import re
from pathlib import Path

import pytest

import kdloss
from reader import blocks, read, script

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

HIDDEN = """<!--
```python
width = 3
```
-->

```python
print(width)
```
"""


def test_a_page_that_hides_its_set_up_fails_for_its_reader(tmp_path):
    assert "NameError: name 'width' is not defined" in read_text(HIDDEN, tmp_path)
    seen = HIDDEN.replace("<!--", "<details>").replace("-->", "</details>")
    assert read_text(seen, tmp_path) == ""
    assert script(seen).splitlines()[2] == "width = 3"  # at its own line of the page


def read_text(text, folder):
    (folder / "page.md").write_text(text, encoding="utf-8")
    return read(folder / "page.md", folder=folder)


def test_the_suite_runs_what_the_reader_sees(pytestconfig, tmp_path):
    """conftest.py uses another parser, which must find the same blocks and leave out the hidden ones."""
    from sybil import Document

    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    for page in [HIDDEN, *(page.read_text("utf-8") for page in PAGES)]:
        collected = [
            page.count("\n", 0, region.start) + 2 for region in conftest._blocks_seen(Document(page, "page.md"))
        ]
        assert collected == [block.line for block in blocks(page) if block.seen]


RECIPES = [block.code for block in blocks((ROOT / "docs" / "recipes.md").read_text("utf-8"))]


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda code: code.splitlines()[0][:40])
def test_a_recipe_needs_the_first_block_of_its_page_alone(recipe):
    names = {}
    exec(RECIPES[0], names)
    exec(recipe, names)


PRINTS = "```python\nprint(1e-16)\n```\n\n```text\n{}\n```\n"


@pytest.mark.parametrize(("stated", "right"), [("1e-16", True), ("5e-17", True), ("1e-06", False), ("", False)])
def test_a_block_prints_what_its_page_says(pytestconfig, stated, right):
    """Up to residuals of rounding."""
    from sybil import Document, Example

    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    document = Document(PRINTS.format(stated), "page.md")
    (region,) = conftest._blocks_seen(document)
    failure = region.evaluator(Example(document, 1, 1, region, {}))
    assert (failure is None) == right
    assert right or "the block prints\n\n1e-16" in failure


@every_page
def test_an_output_follows_the_block_that_prints_it(page):
    text = page.read_text("utf-8")
    assert len(re.findall(r"^```text$", text, re.MULTILINE)) == len(re.findall(r"^```\n\n```text$", text, re.MULTILINE))


@every_page
def test_no_block_is_hidden_or_fenced_in_another_way(page):
    text = page.read_text("utf-8")
    assert not [block.line for block in blocks(text) if not block.seen]
    kinds = set(re.findall(r"^[ \t]*(?:```|~~~)[ \t]*(\S+)", text, re.MULTILINE))
    assert kinds <= {"python", "bash", "diff", "text", "mermaid", "{toctree}", "{eval-rst}"}
    assert len(re.findall(r"^```python$", text, re.MULTILINE)) == len(blocks(text))


@every_page
def test_links_have_a_text(page):
    """`test_site.py` holds that they lead somewhere."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [target for words, target in re.findall(r"\[([^][]*)\]\(([^()\s]+)\)", text) if not words.strip()] == []


def test_every_field_of_a_loss_is_explained_once():
    named = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "weights.md").read_text("utf-8"), re.MULTILINE)
    assert tuple(named) == kdloss.LossOutput._fields
