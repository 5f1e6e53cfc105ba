"""Holds what only a GPU can show of log-probs from logits: bits, graphs, syncs, long tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kdloss
from triton_harness import normal

pytestmark = pytest.mark.gpu

V = 151936


def step(logits: Tensor, labels: Tensor, **options) -> list[Tensor]:
    """(logp, entropy, gradient)."""
    leaf = logits.detach().requires_grad_()
    logp, entropy = kdloss.token_logprobs_and_entropy(leaf, labels, **{"impl": "triton"} | options)
    (gradient,) = torch.autograd.grad(logp.sum() - 0.1 * entropy.sum(), leaf)
    return [logp.detach(), entropy.detach(), gradient]


def problem(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, V, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).mul_(3).to(dtype)
    labels = torch.arange(rows, device="cuda") * 31 % V
    labels[::7] = -100
    return logits, labels


@pytest.mark.parametrize("rows", [1, 64, 257, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_launch_is_near_the_truth(rows, dtype):
    """Few rows, which are split, and many, which are not, against float64 on some of the rows."""
    logits, labels = problem(rows, dtype)
    found = step(logits, labels)
    some = torch.arange(0, rows, max(1, rows // 16), device="cuda")
    exact = step(logits[some].double(), labels[some], impl="torch")
    # log-probs and entropies are about 20 nats, from sums of 150k terms; a gradient is rounded to its dtype
    torch.testing.assert_close(found[0][some].double(), exact[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found[1][some].double(), exact[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found[2][some].double(), exact[2], rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_auto_takes_the_kernels():
    given = problem(64)
    assert all(torch.equal(x, y) for x, y in zip(step(*given), step(*given, impl="auto"), strict=True))


@pytest.mark.parametrize("rows", [3, 300, 4096])
def test_the_same_bits_twice(rows):
    given = problem(rows)
    first = step(*given)
    assert all(torch.equal(x, y) for x, y in zip(step(*given), first, strict=True))


def test_a_tensor_past_2_to_the_31():
    """14,500 rows: the last ones begin past 2^31 elements, in the logits and in the gradient."""
    rows = 2**31 // V + 400
    logits, labels = problem(rows)
    assert logits.numel() > 2**31
    found = step(logits, labels)
    last = slice(rows - 64, rows)
    expected = step(logits[last].clone(), labels[last])
    for x, y in zip(found, expected, strict=True):  # few rows are split, many are not
        torch.testing.assert_close(x[last], y, rtol=1e-2 if x.dtype == torch.bfloat16 else 2e-6, atol=2e-6)


def test_nothing_waits_for_the_device():
    given = problem(64)
    step(*given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [8, 4096])
def test_a_graph_replays_a_step_on_new_inputs(rows):
    logits, labels = problem(rows)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(logits, labels)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, labels)
    logits.copy_(normal(rows, V, seed=5, dtype=torch.bfloat16))
    labels.copy_(labels.flip(0))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(logits, labels), strict=True))


def test_memory_beyond_the_logits_is_the_gradient():
    logits, labels = problem(4096)
    step(logits, labels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(logits, labels)
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * logits.numel() * logits.element_size()


def test_under_a_compiler_too():
    """Compiled by the inductor, in one graph."""
    logits, labels = problem(64)

    def loss(logits: Tensor) -> Tensor:
        return kdloss.sft_loss(kdloss.token_logprobs(logits, labels), loss_mask=labels != -100).loss

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    totals = [loss(leaves[0]), torch.compile(loss, fullgraph=True)(leaves[1])]
    torch.testing.assert_close(*totals, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(total, leaf)[0] for total, leaf in zip(totals, leaves, strict=True)]
    torch.testing.assert_close(*gradients)
