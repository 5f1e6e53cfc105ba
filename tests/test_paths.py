"""Holds the paths that are written down: each leads to a file, `make gpu` names GPU tests, and no room is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where a path of the repository may be named.
TEXTS = [
    *(ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md", "conftest.py", "pyproject.toml", ".ci/run")),
    *(path for folder in ("docs", "src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    *(ROOT / "docs").rglob("*.md"),
]
NAMED = re.compile(r"(?<![\w./-])(?:tests|src/kdloss|benchmarks|docs)/[\w./*-]*[\w*]")
MADE = ("benchmarks/results/", "docs/examples/outputs")  # by a run


def broken(text: str) -> list[str]:
    """The paths in a text that lead nowhere; `*` stands for anything."""
    found = (path.rstrip(".") for path in NAMED.findall(text))
    return [path for path in found if not path.startswith(MADE) and not any(ROOT.glob(path))]


def test_every_path_that_is_named_leads_to_a_file():
    assert {str(path.relative_to(ROOT)): x for path in TEXTS if (x := broken(path.read_text("utf-8")))} == {}


def test_a_path_that_leads_nowhere_is_found():
    moved = "/".join(("tests", "test_moved.py"))
    assert broken(f"see tests/test_paths.py, docs/*.md and {moved}.") == [moved]


def test_make_gpu_runs_every_test_of_a_gpu():
    recipe = re.search(r"^gpu:.*\n(?:\t.*\n)+", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert recipe is not None
    named = NAMED.findall(recipe.group(0))
    assert len(named) >= 2
    for path in named:
        here = ROOT / path
        files = [here] if here.is_file() else [*here.rglob("test_*.py")]
        assert any(re.search(r"mark\.gpu|cuda", file.read_text("utf-8")) for file in files), f"{path} asks for no GPU"
    others = set((ROOT / "tests").rglob("test_*.py")) - {Path(__file__)}
    marked = [file for file in others if "mark.gpu" in file.read_text("utf-8")]
    assert [file for file in marked if not any(file.is_relative_to(ROOT / path) for path in named)] == []


ROOMS = ("_packing", "_softmax", "_logprobs", "_divergences", "_losses", "testing", "integrations", "every_function")


@pytest.mark.parametrize("room", ROOMS)
def test_the_fast_suite_leaves_no_room_out(room, pytestconfig):
    slow = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py")).SLOW
    assert [path for path in slow if not (ROOT / path).exists()] == []
    files = [*(ROOT / "tests" / room).rglob("test_*.py")]
    assert any(not any(file.is_relative_to(ROOT / path) for path in slow) for file in files)
