"""Holds the paths that files name: each exists, `make gpu` runs the GPU tests, `make test-fast` keeps every room."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
NAMING = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "conftest.py", "pyproject.toml")),
    *(path for folder in ("benchmarks", "docs", "src", "tests") for path in (ROOT / folder).rglob("*.py")),
    *(ROOT / "docs").rglob("*.md"),
]


def missing(text: str) -> list[str]:
    """Paths in tests/ and src/, and names of test files, that lead nowhere; a pattern must fit something."""
    paths = set(re.findall(r"\b(?:tests|src/kdloss)/[\w./-]*\w", text))
    names = set(re.findall(r"\btest_\w+\.py\b", text)) - {path.name for path in TESTS}
    return sorted(names | {path for path in paths if not any(ROOT.glob(f"{path}*"))})


def recipe(target: str) -> str:
    """The lines that make runs for a target."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert found is not None, f"no target {target}"
    return found[1]


def test_every_path_that_is_named_exists():
    found = {str(path.relative_to(ROOT)): missing(path.read_text("utf-8")) for path in NAMING}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_path_that_leads_nowhere_is_found():
    gone = "tests/" + "test_" + "gone.py"
    assert missing(f"run {gone} and tests/_triton/test_*.py") == [gone.removeprefix("tests/"), gone]


def runs_on_gpu(path: Path) -> bool:
    """Whether a file, or one in a folder, has tests marked `gpu` or puts its tensors on a GPU if there is one."""
    files = path.rglob("test_*.py") if path.is_dir() else [path]
    return any(re.search(r"^from triton_harness import|mark\.gpu\b", x.read_text("utf-8"), re.MULTILINE) for x in files)


@pytest.mark.parametrize("commands", [recipe("gpu"), (ROOT / "docs" / "kernels.md").read_text("utf-8")])
def test_the_gpu_commands_run_every_gpu_test(commands):
    lines = re.findall(r"\bpytest (tests/.*)", commands)
    given = [ROOT / word for line in lines for word in line.split() if word.startswith("tests/")]
    assert [path for path in given if not runs_on_gpu(path)] == []
    marked = [path for path in TESTS if "pytest.mark.gpu" in path.read_text("utf-8") and path != Path(__file__)]
    assert marked
    assert [path for path in marked if not {path, *path.parents} & {*given}] == []


def test_the_fast_suite_keeps_tests_of_every_room(pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    assert [name for name in conftest.SLOW if not (ROOT / name).exists()] == []
    count: Counter[str] = Counter()
    for path in TESTS:
        if not conftest.is_slow(path) and path.parent != ROOT / "tests":
            text = path.read_text("utf-8")
            count[path.parent.name] += text.count("\ndef test_") - text.count("\n@pytest.mark.slow\n")
    rooms = {"_packing", "_softmax", "_logprobs", "_divergences", "_losses", "testing", "integrations"}
    assert rooms | {"every_function"} <= {room for room, tests in count.items() if tests > 0}
