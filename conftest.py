"""What every test run shares: one thread, hypothesis profiles, markers, and the code blocks of the pages as tests.

`--fuzz EXAMPLES` (see `make fuzz`) runs only the hypothesis tests and divides EXAMPLES among them.
`-m "not slow"` (see `make test-fast`) leaves out everything in `SLOW` and every test marked `slow`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.parsers.myst import PythonCodeBlockParser

from reader import comments

ROOT = Path(__file__).parent

# Files and folders that `make test-fast` leaves out: they start processes, compile, interpret kernels, run examples or
# pages, or draw hundreds of examples. A slow test in any other file is marked `@pytest.mark.slow` there.
SLOW = (
    "README.md",
    "docs",
    "tests/_divergences/test_memory.py",
    "tests/_losses/test_compiled_tail.py",
    "tests/_softmax/test_output_head_models.py",
    "tests/_triton",
    "tests/benchmarks",
    "tests/every_function/test_compile.py",
    "tests/every_function/test_differentiation.py",
    "tests/every_function/test_gradient_table.py",
    "tests/every_function/test_invariants.py",
    "tests/every_function/test_invariants_distributions.py",
    "tests/every_function/test_invariants_packing.py",
    "tests/examples",
    "tests/integrations/test_transformers.py",
    "tests/scale_out",
    "tests/testing/test_audit.py",
    "tests/testing/test_calls.py",
    "tests/testing/test_strategies.py",
)

# Need trainers and servers, each in its own environment: `make test-trainers`, `make test-servers`.
collect_ignore = ["tests/trainers", "tests/servers"]

# Without a GPU, kernels are interpreted. Triton reads this when a kernel is defined, so it must be set before that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test reuses a pool of compiling processes enough to pay for its start.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Tensors here are tiny and xdist already fills the cores; one thread also fixes the order of every sum.
torch.set_num_threads(1)

# In CI every run draws the same examples. Elsewhere every run draws new ones, and a failing one is stored and replayed.
hypothesis.settings.register_profile("kdloss", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("kdloss")
# `make test-fast` draws 25 examples per test instead of a hundred.
hypothesis.settings.register_profile("fast", hypothesis.settings.get_profile("kdloss"), max_examples=25)
# Every run draws new examples, and a failure prints the decorator that replays it on any machine.
hypothesis.settings.register_profile("fuzz", deadline=None, derandomize=False, print_blob=True)

_python_blocks = PythonCodeBlockParser()


def _blocks_seen(document: Document) -> Iterable[Region]:
    """The `python` blocks that the rendered page shows: all but those inside an HTML comment."""
    hidden = comments(document.text)
    for region in _python_blocks(document):
        if not any(start < region.start < end for start, end in hidden):
            region.evaluator = functools.partial(_run_and_compare, region.evaluator)
            yield region


# The `text` block that follows a block on its page: what the block prints.
_PRINTED = re.compile(r"\n\n```text\n(.*?)```", flags=re.DOTALL)


def _run_and_compare(run: Callable[[Example], str | None] | None, example: Example) -> str | None:
    """Runs a block. Returns what is wrong if it prints something else than the `text` block that follows it."""
    assert run is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        failure = run(example)
    stated = _PRINTED.match(example.document.text, example.region.end)
    if failure or stated is None or _rounding_hidden(printed.getvalue()) == _rounding_hidden(stated[1]):
        return failure
    return f"the block prints\n\n{printed.getvalue()}\nand its page says\n\n{stated[1]}"


def _rounding_hidden(text: str) -> str:
    """Replaces residuals of rounding, which differ from machine to machine."""
    return re.sub(r"\b\de-1[4-9]\b", "0e+00", text)


# A page may replace a trainer's function with `mock.patch(...).start()`; the patch ends with the page.
_collect_document = Sybil(
    parsers=[_blocks_seen], patterns=["*.md"], teardown=lambda namespace: mock.patch.stopall()
).pytest()


@functools.cache
def is_slow(path: Path) -> bool:
    """Whether a file or folder is in `SLOW`, or inside a folder that is."""
    return any(ROOT / name in (path, *path.parents) for name in SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "not slow"`, slow files are not even imported."""
    return True if config.getoption("markexpr") == "not slow" and is_slow(collection_path) else None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collects the `python` blocks of README.md and docs/, except docs/examples/. Blocks of one page share their names.

    A page that begins with `<!-- runs in: NAME -->` is left to `make test-trainers` or `make test-servers`, which run
    it in that environment.
    """
    parts = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    if file_path.suffix != ".md":
        return None
    if parts[:1] == ("docs",) and file_path.read_text(encoding="utf-8").startswith("<!-- runs in:"):
        return None
    if parts == ("README.md",) or (parts[:1] == ("docs",) and parts[:2] != ("docs", "examples")):
        return _collect_document(file_path, parent)
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz EXAMPLES`."""
    parser.addoption("--fuzz", type=int, metavar="EXAMPLES", help="only hypothesis tests, EXAMPLES in total")


def pytest_configure(config: pytest.Config) -> None:
    """Loads the profile before the test modules are imported."""
    if config.getoption("fuzz"):
        hypothesis.settings.load_profile("fuzz")
        config.pluginmanager.register(_Fuzz(config.getoption("fuzz")))
    elif config.getoption("markexpr") == "not slow":
        hypothesis.settings.load_profile("fast")


class _Fuzz:
    """Divides the examples among the hypothesis tests and counts those that run."""

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
        if report.when == "call":  # under xdist the reports of its workers arrive here
            self.tests += 1
            self.run += sum(int(str(n)) for name, n in report.user_properties if name == "examples")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"fuzz: {self.run} examples in {self.tests} tests")


def pytest_collection_finish() -> None:
    """Leaves the 800,000 objects that exist now out of every later garbage collection, each of which took 0.4 s."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of `SLOW` and puts them first, and skips `gpu` tests where there is no GPU.

    Short files come last, so that the processes of xdist end together.
    """
    items.sort(key=lambda item: not is_slow(item.path))
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if is_slow(item.path):
            item.add_marker("slow")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
