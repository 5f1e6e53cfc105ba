"""Holds every public function of a head to one rule under autocast: operands are cast, and the logits stay float32.

A walk over the public functions that take `weight`, or `logits`: a new one is held to the same rule.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss

T, V, D, TEACHER_D = 6, 20, 8, 5
LABELS, MASK = torch.arange(T), torch.tensor([True, True, False, True, True, True])


def functions_of(parameter: str) -> list[str]:
    functions = {name: x for name in kdloss.__all__ if inspect.isfunction(x := getattr(kdloss, name))}
    return [name for name, x in functions.items() if parameter in inspect.signature(x).parameters]


def evaluated(name: str, dtype: torch.dtype, *, rounds: torch.dtype | None = None) -> list[Tensor]:
    """The results and the gradients of a function of heads; `rounds`: the dtype that the inputs are cast to before."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    given = {"hidden": made(T, D), "weight": made(V, D), "bias": made(V)}
    teacher = {"teacher_hidden": made(T, TEACHER_D), "teacher_weight": made(V, TEACHER_D), "teacher_bias": made(V)}
    function = getattr(kdloss, name)
    parameters = inspect.signature(function).parameters
    shares = {share: 0.3 for share in ("alpha", "beta") if share in parameters}
    ids = LABELS.clamp(min=0)[:, None] * 0 + torch.tensor([0, 3])
    others = {
        "labels": LABELS,
        "teacher_logp": torch.full((T,), -1.0, dtype=dtype),
        "teacher_topk_logp": torch.full((T, 2), 0.3, dtype=dtype).log(),
        "teacher_topk_ids": ids,
        "tail": "bucket",
    }
    others = {key: x for key, x in others.items() if key in parameters}
    wanted: dict[str, Any] = {**given, **(teacher if "teacher_hidden" in parameters else others), **shares}
    if rounds is not None:
        heads = given.keys() | teacher.keys()
        wanted = {key: x.to(rounds) if key in heads else x for key, x in wanted.items()}
    if name == "fused_linear_loss":
        wanted["token_loss"] = lambda logp, entropy: entropy - logp
    found = function(**wanted, loss_mask=MASK, softcap=5.0, logit_scale=0.5)
    results = [found] if isinstance(found, Tensor) else [*found]
    upstream = [torch.arange(1.0, x.numel() + 1, dtype=x.dtype).view_as(x) for x in results if x.requires_grad]
    torch.autograd.backward([x for x in results if x.requires_grad], upstream)
    gradients = [x.grad for x in given.values()]
    assert all(x.grad is None for x in teacher.values())
    return [x.detach() for x in results] + [x for x in gradients if x is not None]


@pytest.mark.parametrize("name", functions_of("weight"))
def test_under_autocast_a_head_is_cast_as_a_linear_layer_casts_it(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluated(name, torch.float32)
    expected = evaluated(name, torch.float32, rounds=torch.bfloat16)
    assert [x.dtype for x in found] == [torch.float32] * len(found)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    plain = evaluated(name, torch.float32)
    assert not torch.equal(found[0], plain[0])
    # 8 bits of the operands, and none of the logits: those alone would be off by 2^-9 of some nats
    torch.testing.assert_close(found[0], plain[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", functions_of("weight"))
def test_float64_stays_under_autocast_as_in_a_linear_layer(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluated(name, torch.float64)
    for x, y in zip(found, evaluated(name, torch.float64), strict=True):
        assert x.dtype == torch.float64
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", functions_of("logits"))
def test_logits_are_taken_as_they_come_under_autocast(name):
    function = getattr(kdloss, name)
    parameters = inspect.signature(function).parameters
    logits, teacher_logits = torch.randn(2, T, V)
    ids = LABELS[:, None].expand(T, 2) + torch.tensor([0, 3])
    given: dict[str, Any] = {
        "labels": LABELS,
        "loss_mask": MASK,
        "kind": "value",
        "teacher_logp": teacher_logits[:, 0].log_softmax(-1),
        "teacher_logits": teacher_logits,
        "teacher_topk_logp": teacher_logits.log_softmax(-1).gather(-1, ids),
        "teacher_topk_ids": ids,
        "tail": "bucket",
        "alpha": 0.3,
        "beta": 0.3,
    }
    wanted = {key: x for key, x in given.items() if key in parameters}
    plain = function(logits, **wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(logits, **wanted)
    results = ([z] if isinstance(z, Tensor) else [*(z.values() if isinstance(z, dict) else z)] for z in (found, plain))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
