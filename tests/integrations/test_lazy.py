"""Tests how adapters import their trainer: the error says in one sentence what is missing, unsupported or broken."""

import importlib.metadata
import subprocess
import sys

import pytest

import kdloss.integrations
from kdloss.integrations._lazy import Hook, _warn, missing, require


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
def test_another_version_is_refused_where_nothing_can_be_looked_for(install, version):
    install("some-trainer", version)
    message = rf"kdloss.integrations.some_trainer supports some-trainer>=1.16,<1.20, and {version} is installed"
    with pytest.raises(ImportError, match=message):
        require("some-trainer", at_least="1.16", below="1.20")


# what an adapter needs of the trainer below
def replacement(logp, mask, *, option=None): ...


LOSSES = """
class Trainer:
    def step(self, batch):
        return [batch["logp"] for _ in range(3)], batch.get("old_logp")

def loss(logp, mask): return {"a": 1, "b": 2, "c": 3, "mask": 4}
def call(logp, *, scale=1.0): ...
constant = 3
"""
NEEDED = {
    "Trainer.step": Hook(takes=("batch",), keys=("logp", "old_logp")),
    "loss": Hook(replaced_by=replacement, keys=("mask",)),
    "call": Hook(takes=("logp", "scale")),
    "constant": Hook(),
}
RANGE = {"at_least": "1.16", "below": "1.20", "hooks": {"some_trainer": NEEDED}}


@pytest.mark.parametrize("version", ["1.15.9", "1.20.0.dev1", "2.0"])
def test_a_version_that_was_not_tested_is_used_with_a_warning_if_it_has_all_that_is_needed(install, version):
    install("some-trainer", version, LOSSES)
    _warn.cache_clear()
    said = (
        rf"some_trainer was tested with some-trainer>=1.16,<1.20, and {version} is installed: what .* is there, but no"
    )
    with pytest.warns(UserWarning, match=said) as warned:
        assert [require("some-trainer", **RANGE).constant for _ in range(2)] == [3, 3]
    assert len(warned) == 1  # once


@pytest.mark.parametrize(
    ("old", "new", "lacks"),
    [
        ("def step", "def stride", "Trainer.step"),
        ("class Trainer", "class Coach", "Trainer.step"),
        ("self, batch", "self, rows, batches", r"Trainer.step\(batch=\)"),
        ('"old_logp"', '"behaviour_logp"', "the key 'old_logp' of Trainer.step"),
        ('batch["logp"]', 'batch["logps"]', "the key 'logp' of Trainer.step"),
        ('"mask"', '"masks"', "the key 'mask' of loss"),
        ("def loss(logp, mask)", "def loss(logp, mask, weight=None)", r"loss\(logp, mask\)"),
        ("def loss(logp, mask)", "def loss(mask, logp)", r"loss\(logp, mask\)"),
        ("scale=", "factor=", r"call\(scale=\)"),
        ("constant", "number", "constant"),
        ("def call(logp, *, scale=1.0): ...", "call = 5", "call as a function"),
        ("def loss(logp, mask)", "loss = None\ndef other(logp, mask)", "loss"),
        ("def step(self, batch):", "def stride(self, batch):", "Trainer.step"),
        ("def call", "import functools\nloss = functools.partial(loss)\ndef call", "the key 'mask' of loss"),
        ("def call(logp, *, scale=1.0): ...\nconstant = 3", "", r"call, constant"),
    ],
)
def test_a_version_that_was_not_tested_is_refused_for_what_it_lacks(install, old, new, lacks):
    assert old in LOSSES
    install("some-trainer", "1.20", LOSSES.replace(old, new))
    message = (
        rf"some_trainer needs {lacks} in some_trainer, which some-trainer 1.20 does not have; .* tested with .*<1.20$"
    )
    with pytest.raises(ImportError, match=message):
        require("some-trainer", **RANGE)


def test_a_tested_version_is_not_searched(install):
    """A user may have wrapped the functions of a trainer that the adapter was tested with."""
    install("some-trainer", "1.19", "constant = 3")
    assert require("some-trainer", **RANGE).constant == 3
    assert list(missing(require("some-trainer", **RANGE), NEEDED)) == ["Trainer.step", "loss", "call"]


def test_a_module_that_moved_is_named_with_the_range(install):
    install("some-trainer", "1.20")
    message = (
        r"1.20 is installed, but importing some_trainer.moved failed: .*; the adapter was tested with some-trainer>="
    )
    with pytest.raises(ImportError, match=message):
        require("some-trainer", **RANGE | {"hooks": {"some_trainer.moved": {}}}, module="some_trainer.moved")


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
