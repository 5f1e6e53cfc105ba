"""Imports a trainer when its adapter first needs it; the errors for a missing or unsupported one are worded alike."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple


class Hook(NamedTuple):
    """What an adapter relies on at one name of a trainer's module; the name alone, if all of this is left out.

    Attributes:
        takes: parameters that the adapter passes.
        replaced_by: the adapter's function that takes its place, whose parameters must be the same. Keyword-only
            parameters of that function are options of the adapter.
        keys: text that its code must contain: keys of a batch whose absence the adapter would not notice.
    """

    takes: tuple[str, ...] = ()
    replaced_by: Callable[..., Any] | None = None
    keys: tuple[str, ...] = ()


def require(
    package: str,
    *,
    at_least: str,
    below: str,
    module: str | None = None,
    hooks: Mapping[str, Mapping[str, Hook]] | None = None,
) -> ModuleType:
    """Import a module of an installed trainer.

    Hooks of trainers move between versions, and a trainer may accept a loss at a moved hook and never call it. In a
    version that the adapter was not tested with, the hooks are therefore looked for: a missing one is an error, and if
    all are there the version is used with a warning.

    Args:
        package: the trainer's name on PyPI, such as "trl" or "prime-rl".
        at_least, below: the tested versions, at_least <= version < below; a pre-release counts as its release.
        module: the module to return, such as "trl.trainer.grpo_trainer". None: the package itself.
        hooks: for each module that the adapter imports, what the adapter needs there, by dotted names. None: this
            cannot be checked, and a version that was not tested is an error.

    Raises:
        ImportError: the trainer is not installed, lacks a hook, fails to import, or has an unsupported version.
    """
    name = package.replace("-", "_")
    where = module or name
    supported = f"{package}>={at_least},<{below}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"kdloss.integrations.{name} needs {package}, which is not installed: pip install '{supported}'", name=name
        ) from None
    tested = _release(at_least) <= _release(version) < _release(below)
    if not tested and hooks is None:
        raise ImportError(f"kdloss.integrations.{name} supports {supported}, and {version} is installed", name=name)
    note = "" if tested else f"; the adapter was tested with {supported}"
    try:
        found = importlib.import_module(where)
    except ImportError as error:
        raise ImportError(
            f"kdloss.integrations.{name}: {package} {version} is installed, but importing {where} failed: "
            f"{error}{note}",
            name=name,
        ) from error
    if not tested and hooks is not None:
        lacks = ", ".join(missing(found, hooks[where]))
        if lacks:
            raise ImportError(
                f"kdloss.integrations.{name} needs {lacks} in {where}, which {package} {version} does not have{note}",
                name=name,
            )
        _warn(
            f"kdloss.integrations.{name} was tested with {supported}, and {version} is installed: what the adapter "
            "needs is there, but no test ran with this version"
        )
    return found


def missing(module: ModuleType, hooks: Mapping[str, Hook]) -> Iterator[str]:
    """What `module` lacks of `hooks`, in words."""
    for name, hook in hooks.items():
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            yield name
            continue
        theirs = _parameters(found)
        if theirs is None and (hook.replaced_by is not None or hook.takes):
            yield f"{name} as a function"
            continue
        if hook.replaced_by is not None:
            ours = inspect.signature(hook.replaced_by).parameters.values()
            expected = [p.name for p in ours if p.kind is not p.KEYWORD_ONLY]
            if theirs != expected:
                yield f"{name}({', '.join(expected)})"
        if hook.takes:
            yield from (f"{name}({parameter}=)" for parameter in hook.takes if parameter not in (theirs or ()))
        if hook.keys:
            known = set(_texts(getattr(inspect.unwrap(found), "__code__", None)))
            yield from (f"the key {key!r} of {name}" for key in hook.keys if key not in known)


def _parameters(found: object) -> list[str] | None:
    """The names of its parameters; None if it is not called, or does not tell them."""
    try:
        return list(inspect.signature(found).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _texts(constant: object) -> Iterator[str]:
    """Every text in the code of a function, and in those of the functions inside it."""
    if isinstance(constant, str):
        yield constant
    for part in constant if isinstance(constant, tuple) else getattr(constant, "co_consts", ()):
        yield from _texts(part)


@functools.cache
def _warn(message: str) -> None:
    """Warn once for each message."""
    warnings.warn(message, UserWarning, stacklevel=3)


def _release(version: str) -> tuple[int, ...]:
    """(1, 16) for "1.16", "1.16.0" and "1.16.0rc1"."""
    digits = re.match(r"\d+(\.\d+)*", version)
    if digits is None:
        raise ImportError(f"cannot read the version {version!r}")
    numbers = [int(x) for x in digits[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
