"""Holds what is installed: the wheel's files, one version everywhere, type marker, licence, a docstring per name."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdloss

ROOT = Path(__file__).parents[1]
VERSION = importlib.metadata.version("kdloss")


def test_one_version_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', project, re.MULTILINE) == [VERSION]
    assert re.findall(r"^## \[(\d.+?)\]", changelog, re.MULTILINE)[0] == VERSION
    assert getattr(kdloss, "__version__", VERSION) == VERSION


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"kdloss-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    source = ROOT / "src"
    ours = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert "kdloss/py.typed" in ours
    info = f"kdloss-{VERSION}.dist-info"  # its entry point is for verl
    notes = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert files == ours | {f"{info}/{name}" for name in notes}


def test_runtime_needs_only_torch_numpy_and_einops():
    requires = importlib.metadata.requires("kdloss") or []
    runtime = {re.split(r"[^\w-]", line)[0] for line in requires if "extra ==" not in line}
    assert runtime == {"torch", "numpy", "einops"}
    extras = set(importlib.metadata.metadata("kdloss").get_all("Provides-Extra") or [])
    assert {"test", "docs", "examples", "bench", "triton"} <= extras


@pytest.mark.parametrize("name", kdloss.__all__)
def test_every_public_name_has_a_docstring_of_its_own(name):
    # Python gives a dataclass or NamedTuple without a docstring its signature, or "Alias for field".
    doc = getattr(kdloss, name).__doc__ or ""
    assert doc.strip(), f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{name} has only the docstring that Python made"
