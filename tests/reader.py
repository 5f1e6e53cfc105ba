"""Runs a page as its reader would: the `python` blocks that it shows, in order, in one fresh interpreter.

    python tests/reader.py README.md docs/recipes.md    # needs only what the pages themselves import

Blocks inside an HTML comment are not on the rendered page, so they are not run, and what they define is missing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A fenced `python` block of a page."""

    line: int  # of its first line of code, from 1
    code: str
    seen: bool  # False inside an HTML comment


def comments(page: str) -> list[tuple[int, int]]:
    """Start and end of every HTML comment."""
    return [comment.span() for comment in re.finditer(r"<!--.*?-->", page, re.DOTALL)]


def blocks(page: str) -> list[Block]:
    """The `python` blocks of a page, in order."""
    hidden, found = comments(page), []
    for fence in re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        seen = not any(start < fence.start() < end for start, end in hidden)
        found.append(Block(page.count("\n", 0, fence.start(1)) + 1, fence[1], seen))
    return found


def script(page: str) -> str:
    """The visible blocks as one script, each at its own line numbers."""
    lines = [""] * page.count("\n")
    for block in blocks(page):
        if block.seen:
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines) + "\n"


def read(page: Path, *, folder: Path, timeout: float = 300) -> str:
    """Runs the page inside `folder`; returns "" or the output of the failed run."""
    (folder / f"{page.stem}_page.py").write_text(script(page.read_text("utf-8")), "utf-8")
    command = [sys.executable, "-X", "utf8", f"{page.stem}_page.py"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    return f"{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}" if ran.returncode else ""


if __name__ == "__main__":
    failed = 0
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as made:
            said = read(Path(name), folder=Path(made))
        print(f"{name}: {said.strip().splitlines()[-1] if said else 'runs'}", flush=True)
        failed += bool(said)
    sys.exit(bool(failed))
