"""Holds that the tables are complete: value, gradient, compile and error cases of every public function and keyword."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import kdloss
import kdloss.integrations
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


def weighed() -> dict[str, Callable[..., Any]]:
    """Every function of the package that takes the weight of the teacher, and every class that is created with one."""
    adapters = [f"kdloss.integrations.{x.name}" for x in pkgutil.iter_modules(kdloss.integrations.__path__)]
    found = {}
    for module in map(importlib.import_module, ["kdloss", "kdloss.config", "kdloss.schedules", *adapters]):
        for name, value in vars(module).items():
            ours = inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Exception))
            ours = ours and value.__module__.startswith("kdloss") and not name.startswith("_")
            if ours and "distill_loss_weight" in inspect.signature(value).parameters:
                found[f"{value.__module__}.{name}"] = value
    return found


# Called by trainers and configurations: the error for a missing weight has to say where to read on.
NAMES_THE_PAGE = {
    "kdloss.config.KDRLConfig",
    "kdloss.integrations.nemo_rl.KDRLLossFn",
    "kdloss.integrations.openrlhf.KDRLPolicyLoss",
    "kdloss.integrations.prime_rl.kdrl_loss",
    "kdloss.integrations.slime.kdrl_loss",
    "kdloss.integrations.trl.KDRLMixin",
}


def test_the_weight_of_the_teacher_is_a_required_keyword_everywhere():
    found = weighed()
    losses = {"objectives.kdrl_loss", "objectives.kdrl_token_loss", "advantages.fold_kd_reward"}
    assert {*found} == NAMES_THE_PAGE | {f"kdloss._losses.{name}" for name in losses}
    for name, function in found.items():
        weight = inspect.signature(function).parameters["distill_loss_weight"]
        assert (weight.kind, weight.default) == (weight.KEYWORD_ONLY, weight.empty), name
    for name in ("kdrl_loss", "kdrl_token_loss", "kdrl_loss_and_grad", "kdrl_token_loss_and_grad"):
        oracle = getattr(reference, name, None)
        assert oracle is None or inspect.signature(oracle).parameters["distill_loss_weight"].default is weight.empty


@pytest.mark.parametrize("name", sorted(NAMES_THE_PAGE))
def test_a_missing_weight_of_the_teacher_names_the_page(name):
    message = rf"^distill_loss_weight of {name.rpartition('.')[2]} must be given: docs/weights.md says how to choose it"
    with pytest.raises(TypeError, match=message):
        weighed()[name]()
    assert Path(__file__).parents[2].joinpath("docs/weights.md").is_file()
