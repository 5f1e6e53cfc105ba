"""Tests that an environment matches its requirements list, so that results belong to the listed versions."""

import importlib.metadata
import sys
from pathlib import Path

import torch

ENVIRONMENT = Path(sys.prefix).name.removeprefix(".venv-")


def test_what_is_installed_is_what_is_listed():
    lines = (Path(__file__).parent / ENVIRONMENT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in listed}
    assert installed == listed
    assert torch.get_num_threads() == 1
