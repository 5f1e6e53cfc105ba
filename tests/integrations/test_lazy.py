"""Tests how adapters import their trainer: the error says in one sentence what is missing, unsupported or broken."""

import importlib.metadata
import subprocess
import sys

import pytest

import kdloss.integrations
from kdloss.integrations._lazy import require


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Creates a package that pip would list, with a given version and source."""

    def install(package: str, version: str, source: str = "") -> None:
        name = package.replace("-", "_")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        (tmp_path / name / "losses.py").write_text("loss = 1")
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


@pytest.mark.parametrize("version", ["1.16", "1.16.0", "1.16.0rc1", "1.16.3+cpu", "1.19.9"])
def test_a_supported_version_is_imported(install, version):
    install("some-trainer", version)
    assert require("some-trainer", at_least="1.16.0", below="1.20").__name__ == "some_trainer"
    losses = require("some-trainer", at_least="1.16.0", below="1.20", module="some_trainer.losses")
    assert losses.__name__ == "some_trainer.losses"


@pytest.mark.parametrize("version", ["1.15.9", "0.99", "1.20", "1.20.0.dev1", "2.0"])
def test_another_version_is_refused(install, version):
    install("some-trainer", version)
    message = rf"kdloss.integrations.some_trainer supports some-trainer>=1.16,<1.20, and {version} is installed"
    with pytest.raises(ImportError, match=message):
        require("some-trainer", at_least="1.16", below="1.20")


def test_a_missing_trainer_is_named_with_what_installs_it():
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-trainer")
    message = "needs no-such-trainer, which is not installed: pip install 'no-such-trainer>=1,<2'"
    with pytest.raises(ImportError, match=message) as error:
        require("no-such-trainer", at_least="1", below="2")
    assert error.value.name == "no_such_trainer"


def test_a_broken_trainer_says_what_it_lacked(install):
    install("some-trainer", "1.0", "import what_is_not_there")
    with pytest.raises(ImportError, match=r"some-trainer 1.0 is installed, but .* No module named 'what_is_not_there'"):
        require("some-trainer", at_least="1", below="2")


@pytest.mark.slow
def test_importing_the_adapters_imports_no_trainer():
    adapters = sorted(kdloss.integrations.__path__)
    code = (
        "import importlib, pkgutil, sys, kdloss.integrations as adapters\n"
        "names = [x.name for x in pkgutil.iter_modules(adapters.__path__)]\n"
        "for name in names: importlib.import_module(f'kdloss.integrations.{name}')\n"
        "roots = {x.split('.')[0] for x in sys.modules}\n"
        "print(*(roots & {*names, 'transformers', 'accelerate', 'ray', 'vllm', 'nemo_rl', 'prime_rl'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout.split()) == (0, []), (adapters, ran.stderr)
