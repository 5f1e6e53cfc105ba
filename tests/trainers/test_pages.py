"""Runs the `python` blocks of the pages that begin with `<!-- runs in: NAME -->`, each in the environment NAME."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = Path(sys.prefix).name.removeprefix(".venv-")
PAGES = sorted((Path(__file__).parents[2] / "docs" / "integrations").glob("*.md"))
HERE = [page for page in PAGES if page.read_text("utf-8").startswith(f"<!-- runs in: {ENVIRONMENT} -->")]


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_the_page_runs(page, tmp_path):
    """In a process of its own: a page may change its trainer. Lines keep their numbers, for the traceback."""
    script, code = [], False
    for line in page.read_text("utf-8").splitlines():
        fence = re.match(r"```(\w*)", line)
        script.append(line if code and not fence else "")
        code = fence[1] == "python" if fence else code
    assert any(script)
    (tmp_path / f"{page.stem}_page.py").write_text("\n".join(script), "utf-8")
    command = [sys.executable, "-X", "utf8", f"{page.stem}_page.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, f"{page}:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
