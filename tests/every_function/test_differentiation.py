"""Holds what a function does beyond one gradient in reverse mode: it is right, or it raises our error.

Forward mode, `torch.func`, second derivatives, saved-tensor hooks, checkpointing, and an incoming NaN or inf at
untrained tokens. Functions of logits or hidden states have operators of their own, and refuse what these cannot do; all
others are made of torch's operations, and have its tangents.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kdloss
from cases import MASK, TABLE, T
from contract import call, fields, public_function

FUSED = TABLE["linear_token_logprobs"].variants["loss_mask"]
FUSED = {"hidden": FUSED["hidden"], "weight": FUSED["weight"], "labels": FUSED["labels"], "loss_mask": MASK}


def fused(hidden, weight, labels, *, loss_mask):
    return kdloss.fused_linear_loss(hidden, weight, labels, lambda logp, entropy: -logp * entropy, loss_mask=loss_mask)


ATTACHED = {name: (public_function(name), entry) for name, entry in TABLE.items() if entry.gradient == "attached"}
OPERATORS = [name for name, (f, _) in ATTACHED.items() if {"logits", "hidden"} & {*inspect.signature(f).parameters}]
# Every function, with its base call; heads also frozen, because a gradient may then be computed in the forward.
CALLS = {
    name: (function, entry.variants["base"], entry.differentiable, entry.attached)
    for name, (function, entry) in ATTACHED.items()
}
CALLS["fused_linear_loss"] = (fused, FUSED, ("hidden", "weight"), ("loss",))
CALLS |= {
    f"{name}, head frozen": (function, arguments, ("hidden",), attached)
    for name, (function, arguments, _, attached) in CALLS.items()
    if "hidden" in arguments
}
REFUSES = [name for name in CALLS if name.removesuffix(", head frozen") in {*OPERATORS, "fused_linear_loss"}]
SAYS_WHAT_TO_DO = r"Use reverse mode: loss\.backward\(\) or torch\.autograd\.grad, or write this term with torch's"


def objective(name):
    """(a function of the differentiable arguments to a scalar, these arguments, a direction for each)."""
    function, arguments, differentiable, attached = CALLS[name]
    names = [key for key in differentiable if isinstance(arguments.get(key), Tensor)]
    random = torch.Generator().manual_seed(3)

    def scalar(*values):
        found = fields(call(function, {**arguments, **dict(zip(names, values, strict=True))}))
        return sum((x * weights_like(x)).sum() for part, x in found.items() if part in attached)

    leaves = [arguments[key] for key in names]
    return scalar, leaves, [torch.rand(x.shape, generator=random, dtype=torch.float64) for x in leaves]


def weights_like(x):
    return torch.arange(1, x.numel() + 1, dtype=torch.float64).reshape(x.shape).cos()


def reverse_gradients(scalar, leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    return torch.autograd.grad(scalar(*leaves), leaves, materialize_grads=True)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_right_or_refused(name):
    scalar, leaves, directions = objective(name)

    def dual():
        with forward_ad.dual_level():
            pairs = [forward_ad.make_dual(x, v) for x, v in zip(leaves, directions, strict=True)]
            return forward_ad.unpack_dual(scalar(*pairs)).tangent

    ways = [lambda: torch.func.jvp(scalar, tuple(leaves), tuple(directions))[1], dual]
    if name in REFUSES:
        for way in ways:
            with pytest.raises(NotImplementedError, match=f"tangent in forward mode.*{SAYS_WHAT_TO_DO}"):
                way()
        return
    gradients = reverse_gradients(scalar, leaves)
    expected = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
    for way in ways:
        torch.testing.assert_close(way(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSES)
def test_forward_mode_is_right_or_refused_under_compile(name):
    """A compiler has its own formulas for log-probs from logits, and these have a tangent."""
    torch.compiler.reset()
    scalar, leaves, directions = objective(name)
    expected = sum((g * v).sum() for g, v in zip(reverse_gradients(scalar, leaves), directions, strict=True))
    compiled = torch.compile(
        lambda *x: torch.func.jvp(scalar, x, tuple(directions))[1], fullgraph=True, backend="aot_eager"
    )
    if name in ("token_logprobs", "token_logprobs_and_entropy"):
        torch.testing.assert_close(compiled(*leaves), expected, rtol=1e-12, atol=1e-14)
        return
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no tangent in forward mode"):
        compiled(*leaves)


@pytest.mark.parametrize("name", CALLS)
def test_torch_func_is_right_or_refused(name):
    scalar, leaves, _ = objective(name)
    arguments = tuple(range(len(leaves)))
    if name in REFUSES:
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
            with pytest.raises(NotImplementedError, match=SAYS_WHAT_TO_DO):
                transform(scalar, arguments)(*leaves)
        return
    found = torch.func.grad(scalar, arguments)(*leaves)
    for x, expected in zip(found, reverse_gradients(scalar, leaves), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of an operator that runs once per sample
@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_a_loop(name):
    scalar, leaves, directions = objective(name)
    stacked = [torch.stack([x, x + v]) for x, v in zip(leaves, directions, strict=True)]
    expected = torch.stack([scalar(*(x[sample] for x in stacked)) for sample in range(2)])
    torch.testing.assert_close(torch.func.vmap(scalar)(*stacked), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Using backward")  # torch's, of the cycle that create_graph=True makes
@pytest.mark.parametrize("name", REFUSES)
@pytest.mark.parametrize("way", ["grad", "backward"])
def test_a_second_derivative_is_refused(name, way):
    """As in a gradient penalty: the first derivative is right, and what would be dropped raises."""
    scalar, leaves, _ = objective(name)
    expected = reverse_gradients(scalar, leaves)
    leaves = [x.clone().requires_grad_() for x in leaves]
    loss = scalar(*leaves)
    if way == "grad":
        found = torch.autograd.grad(loss, leaves, create_graph=True)
    else:
        loss.backward(create_graph=True)
        found = [x.grad for x in leaves]
    for x, gradient in zip(found, expected, strict=True):
        assert torch.equal(x, gradient)
        with pytest.raises(NotImplementedError, match=r"differentiated once.*write this term with torch's operations"):
            (loss + torch.where(x.isfinite(), x, 0).square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("name", REFUSES)
def test_what_follows_the_graph_to_the_inputs_meets_the_refusal(name):
    """torch prunes the graph to what leads to the inputs, so each input must be reached through the refusal."""
    scalar, leaves, directions = objective(name)
    one, direction = leaves[0], directions[0]
    others = leaves[1:]

    def of_one(x):
        return scalar(x, *others)

    for tool in (torch.autograd.functional.hvp, torch.autograd.functional.jvp):
        with pytest.raises(NotImplementedError, match="differentiated once"):
            tool(of_one, one, direction)
    leaf = one.clone().requires_grad_()
    loss = of_one(leaf)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    penalty = torch.where(first.isfinite(), first, 0).square().sum()
    with pytest.raises(NotImplementedError, match="differentiated once"):
        (loss + penalty).backward(inputs=[leaf], retain_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(penalty, leaf, allow_unused=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CALLS)
def test_the_gradient_through_vmap_is_that_of_a_loop(name):
    scalar, leaves, directions = objective(name)
    found = []
    for each in (torch.func.vmap(scalar), lambda *xs: torch.stack([scalar(*(x[i] for x in xs)) for i in range(2)])):
        stacked = [torch.stack([x, x + v]).requires_grad_() for x, v in zip(leaves, directions, strict=True)]
        found.append(torch.autograd.grad(each(*stacked).sum(), stacked, materialize_grads=True))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_the_way_out_of_these_errors():
    """log_softmax and gather have a tangent, a gradient in torch.func, and a Hessian."""
    logits, labels, direction = torch.randn(4, 5), torch.tensor([0, 2, 4, 1]), torch.randn(4, 5)

    def by_hand(logits):
        return logits.log_softmax(-1).gather(-1, labels[..., None]).sum()

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kdloss.token_logprobs(leaf, labels).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(by_hand)(logits), expected)
    torch.testing.assert_close(torch.func.jvp(by_hand, (logits,), (direction,))[1], (expected * direction).sum())
    assert torch.func.hessian(by_hand)(logits).abs().sum() > 1


@pytest.mark.parametrize("name", REFUSES)
def test_transforms_of_something_else_go_through(name):
    """No tangent and no gradient reaches the operator, so nothing is dropped."""
    scalar, leaves, _ = objective(name)
    value = scalar(*leaves)
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(lambda x: x * scalar(*leaves))(one), value)
    torch.testing.assert_close(torch.func.jvp(lambda x: x * scalar(*leaves), (one,), (one,))[1], value)
    torch.testing.assert_close(torch.func.grad(lambda x: x * scalar(*(y.detach() for y in leaves)))(one), value)


# --- the graph is saved elsewhere, or built again ---------------------------------------------------------------------


def through_hooks(scalar, leaves):
    with saved_tensors_hooks(torch.clone, lambda x: x):
        return scalar(*leaves)


def on_cpu(scalar, leaves):
    with save_on_cpu():
        return scalar(*leaves)


KEPT_ELSEWHERE = {
    "hooks": through_hooks,
    "offloaded": on_cpu,
    "checkpoint": lambda scalar, leaves: checkpoint(scalar, *leaves, use_reentrant=False),
    "reentrant checkpoint": lambda scalar, leaves: checkpoint(scalar, *leaves, use_reentrant=True),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("way", KEPT_ELSEWHERE)
def test_checkpointing_and_offloading_change_no_bit(name, way):
    scalar, leaves, _ = objective(name)
    expected = reverse_gradients(scalar, leaves)
    leaves = [x.clone().requires_grad_() for x in leaves]
    KEPT_ELSEWHERE[way](scalar, leaves).backward()
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# --- what comes in at untrained tokens --------------------------------------------------------------------------------


def per_token(name):
    """Whether a part of the result has an entry per token, of which some are untrained."""
    function, arguments, _, attached = CALLS[name]
    masked = arguments.get("loss_mask") is MASK or "labels" in arguments
    found = fields(call(function, arguments))
    return masked and any(found[part].shape[:1] == (T,) for part in attached)


@pytest.mark.parametrize("name", [name for name in CALLS if per_token(name)])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_incoming_gradient_at_an_untrained_token_leaves_no_trace(name, poison):
    function, arguments, differentiable, attached = CALLS[name]
    found = []
    for elsewhere in (0.0, poison):
        leaves = {k: arguments[k].clone().requires_grad_() for k in differentiable if k in arguments}
        result = fields(call(function, arguments | leaves))
        parts = [result[part] for part in attached]
        incoming = [torch.where(MASK, weights_like(x), elsewhere) for x in parts]
        found.append(torch.autograd.grad(parts, list(leaves.values()), incoming))
    for clean, poisoned in zip(*found, strict=True):
        assert torch.equal(clean, poisoned)
