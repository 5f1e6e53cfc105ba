"""Holds what is built and installed: files of wheel and sdist, one version everywhere, bounds, a docstring per name."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kdloss

ROOT = Path(__file__).parents[1]
VERSION = importlib.metadata.version("kdloss")


def test_one_version_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', project, re.MULTILINE) == [VERSION]
    assert re.findall(r"^## \[(\d.+?)\]", changelog, re.MULTILINE)[0] == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert getattr(kdloss, "__version__", VERSION) == VERSION


def built(target: str, folder: Path) -> Path:
    build = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (file,) = folder.iterdir()
    return file


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling")
    wheel = built("wheel", tmp_path)
    assert wheel.name == f"kdloss-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    source = ROOT / "src"
    ours = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert "kdloss/py.typed" in ours
    info = f"kdloss-{VERSION}.dist-info"  # its entry point is for verl
    notes = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert files == ours | {f"{info}/{name}" for name in notes}


@pytest.mark.slow
def test_the_sdist_is_the_repository(tmp_path):
    """Tests read pages, examples and each other's data: in an sdist that lacks a file some would fail."""
    pytest.importorskip("hatchling")
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    with tarfile.open(built("sdist", tmp_path)) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert files == {name for name in listed.stdout.splitlines() if (ROOT / name).exists()} | {"PKG-INFO"}


def bounds() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for, by extra; "" is the package itself."""
    found: dict[str, list[Requirement]] = {}
    for line in importlib.metadata.requires("kdloss") or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        found.setdefault(extra[1] if extra else "", []).append(Requirement(line))
    return found


def pins(file: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_every_pinned_version_is_within_the_bounds():
    # trainers are pinned in tests/trainers, one environment each
    asked = [x for extra, found in bounds().items() if extra not in ("areal", "trl", "verl") for x in found]
    pinned = pins("constraints.txt")
    assert [x.name for x in asked if x.name not in pinned] == []
    assert [str(x) for x in asked if not x.specifier.contains(pinned[x.name])] == []


def test_the_oldest_versions_are_tested():
    oldest = pins("tests/compat/oldest.txt")
    assert [str(x) for x in bounds()[""] if not f">={oldest[x.name]}.".startswith(f"{x.specifier}.")] == []


def test_nothing_advises_to_install_kdloss_from_an_index():
    """It is on none yet. A release that puts it there deletes this test."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]
    assert [x.name for x in files if re.search(r"pip install \W?kdloss", x.read_text(encoding="utf-8"))] == []


def test_runtime_needs_only_torch_numpy_and_einops():
    assert {x.name for x in bounds()[""]} == {"torch", "numpy", "einops"}
    extras = set(importlib.metadata.metadata("kdloss").get_all("Provides-Extra") or [])
    assert {"test", "docs", "examples", "bench", "triton"} <= extras


@pytest.mark.parametrize("name", kdloss.__all__)
def test_every_public_name_has_a_docstring_of_its_own(name):
    # Python gives a dataclass or NamedTuple without a docstring its signature, or "Alias for field".
    doc = getattr(kdloss, name).__doc__ or ""
    assert doc.strip(), f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{name} has only the docstring that Python made"
