"""Holds the registration of operators: what the first call brings in, defaults, and modules that are loaded again."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import kdloss
from kdloss._divergences import hidden_op, logits_op, topk_op
from kdloss._softmax import operator as registration
from kdloss._softmax.operator import operator

# Every operator and its backward, once.
FIRST_CALLS = """
import resource, sys, torch, kdloss
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
logits, teacher, labels = torch.randn(4, 11, requires_grad=True), torch.randn(4, 11), torch.arange(4)
hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(11, 3, requires_grad=True)
head, mask, top = (hidden.detach(), weight.detach()), labels >= 0, teacher.log_softmax(-1).topk(3)
kdloss.token_logprobs(logits, labels).sum().backward()
kdloss.reverse_kl(logits, teacher).sum().backward()
kdloss.topk_forward_kl(logits, top.values, top.indices, tail="bucket").sum().backward()
kdloss.linear_token_logprobs(hidden, weight, labels).sum().backward()
kdloss.linear_reverse_kl(hidden, weight, *head, loss_mask=mask).sum().backward()
kdloss.linear_reverse_kl(hidden, head[1], *head, loss_mask=mask).sum().backward()
kdloss.fused_linear_loss(hidden, weight, labels, lambda logp, entropy: -logp, loss_mask=mask).loss.backward()
print(peak() - before, *sorted({name.partition(".")[0] for name in sys.modules}), "torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_the_first_calls_import_neither_dynamo_nor_sympy():
    ran = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, timeout=120, check=True)
    grown, *modules, dynamo = ran.stdout.split()
    assert "kdloss" in modules
    assert "sympy" not in modules
    assert dynamo == "False"
    assert float(grown) < 30, f"{grown} MiB beyond the imports"


def test_arguments_that_equal_their_defaults_reach_the_gradient():
    """The dispatcher drops them on the way."""
    seen = []

    @operator("test_defaults")
    def scaled(x: torch.Tensor, factor: float = 2.0, power: int = 1) -> torch.Tensor:
        return factor * x**power

    def save(ctx, inputs, output):
        seen.append(inputs[1:])
        ctx.factor = inputs[1]

    scaled.register_autograd(lambda ctx, upstream: (ctx.factor * upstream,), save)
    x = torch.ones(3, requires_grad=True)
    scaled(x, 2.0, power=1).sum().backward()
    assert seen == [(2.0, 1)]
    assert x.grad.tolist() == [2, 2, 2]


def test_an_operator_without_a_gradient_raises_in_the_backward():
    @operator("test_no_gradient")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert not twice(torch.ones(3)).requires_grad
    found = twice(torch.ones(3, requires_grad=True))
    with pytest.raises(NotImplementedError, match=r"kdloss::test_no_gradient has no second derivative"):
        found.sum().backward()


@pytest.mark.parametrize("module", [logits_op, hidden_op, topk_op, registration])
def test_a_module_can_be_loaded_again(module):
    """As notebooks do that reload changed files; what was imported before goes on working."""
    logits, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    expected = kdloss.reverse_kl(logits, teacher)
    importlib.reload(module)
    found = kdloss.reverse_kl(logits, teacher)
    assert torch.equal(found, expected)
    found.sum().backward()


@pytest.mark.slow
def test_opcheck_of_an_operator_without_a_gradient():
    upstream, logits, teacher = torch.randn(3), torch.randn(3, 5), torch.randn(3, 5)
    given = (upstream, logits, teacher, None, torch.empty(0), "reverse_kl", 0.0, 1.0, 5, False)
    torch.library.opcheck(logits_op._divergence_backward.overload, given)
