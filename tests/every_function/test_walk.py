"""Holds the walk: no public function without value, gradient, compile and error cases, no keyword left at default."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

import kdloss
from bad_calls import BAD, Bad
from cases import TABLE, Entry
from contract import public_function
from kdloss.testing import reference

# What is public and no function with an oracle.
EXCEPTED = {
    "KDRLConfig": "a dataclass; test_config.py holds it",
    "FusedLoss": "a result, of the function below",
    "LogprobsAndEntropy": "a result: its fields are compared wherever a function returns it",
    "LossOutput": "a result, as above",
    "Surrogate": "a result, as above",
    "VocabShard": "marks which slice a rank holds; tests/scale_out/ holds it",
    "config": "a module, whose one public name is KDRLConfig",
    "schedules": "a module, whose functions are walked as schedules.<name>",
}
# Takes a function of the user's, which no oracle has; a file of its own holds value, gradient, compilation and errors.
HELD_ELSEWHERE = {"fused_linear_loss": "_logprobs/test_fused.py"}
# Keywords that need other ranks: they have a bad call each, and `tests/scale_out` holds their values.
ACROSS_RANKS = {"shard", "group", "split_group"}


def public_functions() -> list[str]:
    schedules = [
        f"schedules.{name}"
        for name, function in inspect.getmembers(kdloss.schedules, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == kdloss.schedules.__name__
    ]
    return [name for name in kdloss.__all__ if name not in {*EXCEPTED, *HELD_ELSEWHERE}] + schedules


def is_default(value: object, default: object) -> bool:
    if isinstance(value, Tensor) or isinstance(default, Tensor):
        return value is default
    return value == default


def faults(functions: list[str], table: dict[str, Entry], bad: dict[str, list[Bad]]) -> Iterator[str]:
    """Everything that the table leaves out, one sentence each."""
    yield from (f"{name} is in the table and not public" for name in sorted({*table, *bad} - {*functions}))
    for name in functions:
        if name not in table:
            yield f"{name} has no value case"
            continue
        entry, last_name = table[name], name.rpartition(".")[2]
        if not entry.variants:
            yield f"{name} has no value case"
        if not hasattr(reference, last_name):
            yield f"{name} has no oracle"
        if not bad.get(name):
            yield f"{name} has no bad call"
        if entry.gradient != "number" and not entry.compiled:
            yield f"{name} has no compile case"
        yield from (f"{name} compiles an unknown case {case}" for case in entry.compiled if case not in entry.variants)
        if (entry.gradient == "attached") != hasattr(reference, f"{last_name}_grad"):
            yield f"{name} is marked {entry.gradient}, and its oracle says otherwise"
        if (entry.gradient == "attached") != bool(entry.differentiable):
            yield f"{name} is marked {entry.gradient} and names {entry.differentiable} as differentiable"
        yield from keyword_faults(name, entry, bad.get(name, []))


def keyword_faults(name: str, entry: Entry, bad: list[Bad]) -> Iterator[str]:
    for parameter in inspect.signature(public_function(name)).parameters.values():
        key, default = parameter.name, parameter.default
        if key in ACROSS_RANKS:
            if not any(key in call.changes and call.error is TypeError for call in bad):
                yield f"{name}({key}=) is refused by no bad call"
            continue
        values = [arguments[key] for arguments in entry.variants.values() if key in arguments]
        if all(is_default(value, default) for value in values):
            yield f"{name}({key}=) is never set to anything but its default"
        if (
            "None" in str(parameter.annotation).split(" | ")
            and default is not None
            and all(value is not None for value in values)
        ):
            yield f"{name}({key}=None) has no case"


def test_every_public_function_is_covered():
    assert list(faults(public_functions(), TABLE, BAD)) == []


def test_exceptions_are_public_names_that_are_no_functions():
    assert set(EXCEPTED) <= set(kdloss.__all__)
    assert [name for name in EXCEPTED if inspect.isfunction(getattr(kdloss, name))] == []


def test_the_walk_sees_every_function_of_every_module():
    """`public_functions` itself: whatever a private module defines without an underscore and exports is walked."""
    exported = {name for name, x in vars(kdloss).items() if inspect.isfunction(x) and not name.startswith("_")}
    assert exported == {name for name in public_functions() if "." not in name} | {*HELD_ELSEWHERE}
    for name, file in HELD_ELSEWHERE.items():
        assert f"kdloss.{name}(" in Path(__file__).parents[1].joinpath(file).read_text(encoding="utf-8")
    assert {"schedules.constant", "schedules.cosine", "schedules.linear_floor", "schedules.switch"} <= set(
        public_functions()
    )
