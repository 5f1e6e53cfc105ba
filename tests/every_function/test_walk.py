"""Holds that the tables are complete: value, gradient, compile and error cases of every public function and keyword."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

import kdloss
from bad_calls import BAD
from cases import TABLE
from contract import public_function
from kdloss.testing import reference

# Public names that are not functions.
EXCEPTED = {
    "Alignment": "a result, of check_alignment below",
    "BatchReport": "a result, of check_batch below",
    "KDRLConfig": "a dataclass; test_config.py holds it",
    "FusedLoss": "a result, of the function below",
    "LogprobsAndEntropy": "a result: its fields are compared wherever a function returns it",
    "LossOutput": "a result, likewise",
    "OutputHead": "a result, of output_head below",
    "Surrogate": "a result, likewise",
    "VocabShard": "marks which slice a rank holds; tests/scale_out/ holds it",
    "config": "a module, whose one public name is KDRLConfig",
    "schedules": "a module, whose functions are walked as schedules.<name>",
}
# Take a function or a module, or read the values of a batch for a person, so they have no oracle. Their own files test
# values, gradients and errors.
HELD_ELSEWHERE = {
    "check_alignment": "_losses/test_alignment.py",
    "check_batch": "_losses/test_check_batch.py",
    "fused_linear_loss": "_logprobs/test_fused.py",
    "output_head": "_softmax/test_output_head.py",
}
# Keywords that need other ranks: each has a bad call, and `tests/scale_out` tests their values.
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


def faults() -> Iterator[str]:
    """Everything that the tables leave out, one sentence each."""
    yield from (f"{name} is in a table and not public" for name in sorted({*TABLE, *BAD} - {*public_functions()}))
    for name in public_functions():
        if name not in TABLE or not TABLE[name].variants:
            yield f"{name} has no value case"
            continue
        entry, last_name = TABLE[name], name.rpartition(".")[2]
        if not hasattr(reference, last_name):
            yield f"{name} has no oracle"
        if not BAD.get(name):
            yield f"{name} has no bad call"
        if entry.gradient != "number" and not entry.compiled:
            yield f"{name} has no compile case"
        yield from (f"{name} compiles an unknown case {case}" for case in entry.compiled if case not in entry.variants)
        if (entry.gradient == "attached") != hasattr(reference, f"{last_name}_grad"):
            yield f"{name} is marked {entry.gradient}, and its oracle says otherwise"
        if (entry.gradient == "attached") != bool(entry.differentiable):
            yield f"{name} is marked {entry.gradient} and names {entry.differentiable} as differentiable"
        yield from keyword_faults(name)


def keyword_faults(name: str) -> Iterator[str]:
    for parameter in inspect.signature(public_function(name)).parameters.values():
        key, default = parameter.name, parameter.default
        if key in ACROSS_RANKS:
            if not any(key in call.changes and call.error is TypeError for call in BAD.get(name, [])):
                yield f"{name}({key}=) is refused by no bad call"
            continue
        values = [arguments[key] for arguments in TABLE[name].variants.values() if key in arguments]
        if all(is_default(value, default) for value in values):
            yield f"{name}({key}=) is never set to anything but its default"
        if (
            "None" in str(parameter.annotation).split(" | ")
            and default is not None
            and all(value is not None for value in values)
        ):
            yield f"{name}({key}=None) has no case"


def test_every_public_function_is_covered():
    assert list(faults()) == []


def test_exceptions_are_public_names_and_not_functions():
    assert set(EXCEPTED) <= set(kdloss.__all__)
    assert [name for name in EXCEPTED if inspect.isfunction(getattr(kdloss, name))] == []


def test_the_walk_sees_every_function_of_every_module():
    """`public_functions` misses no function that `kdloss` exports, and no schedule."""
    exported = {name for name, x in vars(kdloss).items() if inspect.isfunction(x) and not name.startswith("_")}
    assert exported == {name for name in public_functions() if "." not in name} | {*HELD_ELSEWHERE}
    for name, file in HELD_ELSEWHERE.items():
        assert f"kdloss.{name}(" in Path(__file__).parents[1].joinpath(file).read_text(encoding="utf-8")
    assert {"schedules.constant", "schedules.cosine", "schedules.linear_floor", "schedules.switch"} <= set(
        public_functions()
    )
