"""Holds the errors: every bad call of `bad_calls.py` raises as stated, and tensor arguments take only tensors."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
import typing

import pytest
import torch
from torch import Tensor

import kdloss
from bad_calls import BAD
from cases import CU, TABLE
from contract import call, cast, fields, public_function


def raises(name, arguments, error, message):
    """The message is exactly `message`, where "..." matches anything."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    with pytest.raises(error, match=pattern) as caught:
        call(public_function(name), arguments)
    # the exact type: an IndexError or NotImplementedError instead of a ValueError is an accident, not a check
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("name", "bad"),
    [pytest.param(name, bad, id=f"{name}-{bad.what}") for name, calls in BAD.items() for bad in calls],
)
def test_a_bad_call_says_what_is_wrong(name, bad):
    raises(name, TABLE[name].variants["base"] | bad.changes, bad.error, bad.message)


@pytest.mark.parametrize("name", BAD)
def test_stated_messages_name_the_argument_and_what_came(name):
    """A stated message without either would pass the test above."""
    for bad in BAD[name]:
        arguments = inspect.signature(public_function(name)).parameters
        assert any(re.search(rf"\b{argument}\b", bad.message) for argument in arguments), bad.what
        came = r"\bgot\b|it is |there are |must be given|not supported yet|has no kernel yet"
        assert re.search(came, bad.message), bad.what


def no_tensors():
    """(function, argument, value) for every argument that takes a tensor and no number."""
    for name in TABLE:
        for parameter in inspect.signature(public_function(name)).parameters.values():
            kinds = set(str(parameter.annotation).split(" | "))
            if "Tensor" in kinds <= {"Tensor", "None"}:
                for value in ([0.0] * 17, 1.0, *([] if "None" in kinds else [None])):
                    kind = "None" if value is None else type(value).__name__
                    yield pytest.param(name, parameter.name, value, kind, id=f"{name}-{parameter.name}-{kind}")


@pytest.mark.parametrize(("name", "argument", "value", "kind"), list(no_tensors()))
def test_anything_but_a_tensor_is_a_type_error_that_names_the_argument(name, argument, value, kind):
    # in the first variant that sets the argument: one that is not read is not checked
    used = next(v for v in TABLE[name].variants.values() if isinstance(v.get(argument), Tensor))
    raises(name, used | {argument: value}, TypeError, f"{argument} must be a ...tensor, got {kind}")


def of_integers():
    """(function, argument) for every argument that is always a tensor of integers."""
    for name, entry in TABLE.items():
        for argument in inspect.signature(public_function(name)).parameters:
            given = [v[argument] for v in entry.variants.values() if isinstance(v.get(argument), Tensor)]
            if given and argument != "normalizer" and {x.dtype for x in given} <= {torch.int32, torch.int64}:
                yield pytest.param(name, argument, id=f"{name}-{argument}")


@pytest.mark.parametrize(("name", "argument"), list(of_integers()))
def test_one_rule_says_which_integers_an_argument_takes(name, argument):
    """`labels` are int64, as torch's losses take them, and every other argument of integers is int32 or int64."""
    arguments = next(v for v in TABLE[name].variants.values() if isinstance(v.get(argument), Tensor))
    rule = "labels must be torch.int64" if argument == "labels" else f"{argument} must be int32 or int64"
    for dtype in (torch.float32, torch.int16, torch.bool):
        raises(name, arguments | {argument: arguments[argument].to(dtype)}, TypeError, f"{rule}, got {dtype}")
    narrow = arguments | {argument: arguments[argument].int()}
    if argument == "labels":
        raises(name, narrow, TypeError, f"{rule}, got torch.int32; convert them with labels.long()")
        narrow[argument] = narrow[argument].long()
    expected = fields(call(public_function(name), arguments))
    for part, x in fields(call(public_function(name), narrow)).items():
        torch.testing.assert_close(x, expected[part], equal_nan=True, rtol=0, atol=0, check_dtype=False)


def choices():
    """(function, keyword, its values) for every keyword of a public function that takes one of a few words."""
    for name in TABLE:
        function = public_function(name)
        for parameter in inspect.signature(function).parameters.values():
            assert "str" not in str(parameter.annotation).split(" | "), f"{name}({parameter.name}=) takes any text"
            kind = function.__globals__.get(parameter.annotation)
            if typing.get_origin(kind) is typing.Literal:
                yield pytest.param(name, parameter.name, typing.get_args(kind), id=f"{name}-{parameter.name}")


@pytest.mark.slow  # interprets kernels
@pytest.mark.parametrize(("name", "keyword", "values"), list(choices()))
def test_a_type_checker_knows_the_words_that_a_keyword_takes(name, keyword, values):
    """The values of the `Literal` are those that the call accepts, and the error names the same ones."""
    if keyword == "impl":
        importlib.import_module("triton_harness")  # its patch makes interpreted kernels fast
    arguments = TABLE[name].variants["base"]
    raises(
        name,
        arguments | {keyword: "token-mean"},
        ValueError,
        f"{keyword} must be one of {', '.join(map(repr, values))}, got",
    )
    streams = {"cu_seqlens": CU} if "cu_seqlens" in inspect.signature(public_function(name)).parameters else {}
    for value in values:  # in float32, which the kernels take
        bound = {"max_statistic": 1.0} if keyword == "statistic" and value != "ratio" else {}
        bound |= {"action": "mask"} if bound and "action" in arguments else {}
        call(public_function(name), cast(arguments, torch.float32) | streams | bound | {keyword: value})


def test_the_words_of_a_config_are_those_of_the_loss():
    (keyword,) = [f.name for f in dataclasses.fields(kdloss.KDRLConfig) if f.type == "Reduction"]
    assert inspect.signature(kdloss.kdrl_loss).parameters[keyword].annotation == "Reduction"
    assert not any(f.type == "str" for f in dataclasses.fields(kdloss.KDRLConfig))
    with pytest.raises(ValueError, match=r"^reduction must be one of 'token_mean', 'sequence_mean', got 'token-mean'$"):
        kdloss.KDRLConfig(distill_loss_weight=1.0, reduction="token-mean")


def infinite():
    """(function, keyword, variant) for every keyword that takes a number, in every variant."""
    for name, entry in TABLE.items():
        for parameter in inspect.signature(public_function(name)).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and "float" in str(parameter.annotation).split(" | "):
                for variant, arguments in entry.variants.items():
                    floats = [x for x in arguments.values() if isinstance(x, Tensor) and x.dtype.is_floating_point]
                    if floats:  # a variant that moves integers cannot be filled with infinity
                        case = f"{name}-{parameter.name}-{variant}"
                        yield pytest.param(name, parameter.name, variant, id=case)


@pytest.mark.filterwarnings("ignore:direct_penalty")
@pytest.mark.parametrize(("name", "keyword", "variant"), list(infinite()))
def test_an_infinite_number_is_refused_or_a_bound_that_never_acts(name, keyword, variant):
    """It never turns into NaN: where a bound may be infinite, no product of 0 and infinity is left."""
    arguments = TABLE[name].variants[variant]
    for value in (math.inf, -math.inf):
        try:
            result = fields(call(public_function(name), arguments | {keyword: value}))
        except ValueError as error:
            assert re.search(rf"\b{keyword}\b", str(error))  # noqa: PT017
            continue
        before = fields(call(public_function(name), arguments))
        for part, x in result.items():
            if isinstance(x, Tensor) and x.dtype.is_floating_point:
                assert (x.isnan() <= before[part].isnan()).all(), part


def numbers():
    """(function, keyword) for every keyword that takes a number, and not None."""
    for name in TABLE:
        for parameter in inspect.signature(public_function(name)).parameters.values():
            kinds = set(str(parameter.annotation).split(" | "))
            if {"float"} <= kinds <= {"float", "Tensor"} and parameter.name != "fill":  # torch checks what fills
                yield pytest.param(name, parameter.name, id=f"{name}-{parameter.name}")


@pytest.mark.parametrize(("name", "keyword"), list(numbers()))
def test_none_in_place_of_a_number_is_named(name, keyword):
    came = f"{keyword} must be a Python number, got NoneType None"
    raises(name, TABLE[name].variants["base"] | {keyword: None}, TypeError, came)


def test_advantages_of_padded_sequences_are_told_how_to_become_per_token():
    logp, mask, advantages = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([1.0, -1.0])
    with pytest.raises(ValueError, match=r"got \(2,\); .* with advantages\[:, None\]\.expand_as\(logp\)$"):
        kdloss.grpo_loss(logp, None, advantages, loss_mask=mask)
    kdloss.grpo_loss(logp, None, advantages[:, None].expand_as(logp), loss_mask=mask)
    with pytest.raises(ValueError, match=r"got \(2, 1\); .* with advantages\.expand_as\(logp\)$"):
        kdloss.grpo_loss(logp, None, advantages[:, None], loss_mask=mask)
