"""Imports a trainer when its adapter first needs it; the errors for a missing or unsupported one are worded alike."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType


def require(package: str, *, at_least: str, below: str, module: str | None = None) -> ModuleType:
    """Import a module of an installed trainer, in a version that the adapter was tested with.

    Hooks of trainers move between versions, and a trainer may accept a loss at a moved hook and never call it. Another
    version is therefore an error.

    Args:
        package: the trainer's name on PyPI, such as "trl" or "prime-rl".
        at_least, below: the supported versions, at_least <= version < below; a pre-release counts as its release.
        module: the module to return, such as "trl.trainer.grpo_trainer". None: the package itself.

    Raises:
        ImportError: the trainer is not installed, has an unsupported version, or fails to import.
    """
    name = package.replace("-", "_")
    supported = f"{package}>={at_least},<{below}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"kdloss.integrations.{name} needs {package}, which is not installed: pip install '{supported}'", name=name
        ) from None
    if not _release(at_least) <= _release(version) < _release(below):
        raise ImportError(f"kdloss.integrations.{name} supports {supported}, and {version} is installed", name=name)
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise ImportError(
            f"kdloss.integrations.{name}: {package} {version} is installed, but importing {module or name} failed: "
            f"{error}",
            name=name,
        ) from error


def _release(version: str) -> tuple[int, ...]:
    """(1, 16) for "1.16", "1.16.0" and "1.16.0rc1"."""
    digits = re.match(r"\d+(\.\d+)*", version)
    if digits is None:
        raise ImportError(f"cannot read the version {version!r}")
    numbers = [int(x) for x in digits[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
