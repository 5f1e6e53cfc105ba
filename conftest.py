"""What every test run shares: one thread, hypothesis profiles, `gpu` marker, and the documents' code blocks as tests.

`--fuzz EXAMPLES` (see `make fuzz`) runs the hypothesis tests alone, with that many examples among them. `--fast` (see
`make test-fast`) leaves out what is slow: the files of `SLOW`, and tests marked `slow`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from sybil import Document, Region, Sybil
from sybil.parsers.myst import PythonCodeBlockParser

from reader import comments

ROOT = Path(__file__).parent

# Needs the trainers, each in its own environment: `make test-trainers`.
collect_ignore = ["tests/trainers"]

# What `--fast` leaves out as a whole: whatever compiles, interprets kernels, starts processes, draws many examples or
# trains a model. A slow test in another file is marked `slow`.
SLOW = (
    "tests/_divergences/test_memory.py",
    "tests/_losses/test_compiled_tail.py",
    "tests/_triton",
    "tests/benchmarks",
    "tests/every_function/test_compile.py",
    "tests/every_function/test_gradient_table.py",
    "tests/every_function/test_invariants.py",
    "tests/every_function/test_invariants_distributions.py",
    "tests/every_function/test_invariants_packing.py",
    "tests/examples",
    "tests/scale_out",
)

# Without a GPU, kernels are interpreted. Triton reads this when a kernel is defined, so it has to be there first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors here are tiny and xdist already fills the cores; one thread also fixes the order of every sum.
torch.set_num_threads(1)

# In CI the same examples run every time; elsewhere each run looks at new ones, and a failure is kept and replayed.
hypothesis.settings.register_profile("kdloss", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("kdloss")
# New examples every time, and a failure prints what replays it anywhere.
hypothesis.settings.register_profile("fuzz", deadline=None, derandomize=False, print_blob=True)

_python_blocks = PythonCodeBlockParser()


def _blocks_seen(document: Document) -> Iterable[Region]:
    """The `python` blocks that a reader of the page sees: what is in an HTML comment defines nothing for him."""
    hidden = comments(document.text)
    return (
        region for region in _python_blocks(document) if not any(start < region.start < end for start, end in hidden)
    )


# A page may put a stand-in in a trainer's place with `mock.patch(...).start()`; it ends with the page.
_collect_document = Sybil(
    parsers=[_blocks_seen], patterns=["*.md"], teardown=lambda namespace: mock.patch.stopall()
).pytest()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The `python` blocks of README.md and docs/, but not of docs/examples/; blocks of one document share names.

    Nor of a page that begins with `<!-- runs in: NAME -->`: `make test-trainers` runs it in that environment.
    """
    parts = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    if parts[:2] == ("docs", "integrations") and file_path.read_text(encoding="utf-8").startswith("<!-- runs in:"):
        return None
    if parts == ("README.md",) or (parts[:1] == ("docs",) and parts[:2] != ("docs", "examples")):
        return _collect_document(file_path, parent)
    return None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--fast`, slow files are not even imported."""
    slow = config.getoption("fast") and any(collection_path == ROOT / path for path in SLOW)
    return True if slow else None


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz EXAMPLES`, `--fast`."""
    parser.addoption("--fast", action="store_true", help="leave out slow files and tests marked slow")
    parser.addoption("--fuzz", type=int, metavar="EXAMPLES", help="hypothesis tests alone, with EXAMPLES in all")


def pytest_configure(config: pytest.Config) -> None:
    """The profile has to be there before the test modules are read."""
    if config.getoption("fuzz"):
        hypothesis.settings.load_profile("fuzz")
        config.pluginmanager.register(_Fuzz(config.getoption("fuzz")))


class _Fuzz:
    """Shares the examples out among the hypothesis tests, and counts those that were run."""

    def __init__(self, examples: int) -> None:
        self.examples, self.count, self.tests, self.run = examples, 0, 0, 0

    @pytest.hookimpl(trylast=True)  # hypothesis marks its tests in this hook
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.get_closest_marker("hypothesis")]
        share = hypothesis.settings(max_examples=math.ceil(self.examples / max(1, len(items))))
        for function in {item.obj for item in items if isinstance(item, pytest.Function)}:
            share(function)
            function.hypothesis.inner_test = self.counted(function.hypothesis.inner_test)

    def counted(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def counting(*args: Any, **keywords: Any) -> Any:
            self.count += 1
            return test(*args, **keywords)

        return counting

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        before = self.count
        yield
        item.user_properties.append(("examples", self.count - before))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":  # where xdist runs, its workers' reports arrive here
            self.tests += 1
            self.run += sum(int(str(n)) for name, n in report.user_properties if name == "examples")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"fuzz: {self.run} examples in {self.tests} tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where there is no GPU, and deselects `slow` ones with `--fast`."""
    if config.getoption("fast"):
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
