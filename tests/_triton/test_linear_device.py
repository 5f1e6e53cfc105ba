"""Holds what only a GPU can show of log-probs from hidden states: bits, syncs, graphs, memory, 2^31 entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._logprobs import from_hidden
from kdloss._triton import _products
from triton_harness import normal

pytestmark = pytest.mark.gpu

V, D = 151936, 256


def token_loss(logp: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
    return -logp * advantages - 0.1 * entropy


class Step:
    """A training step of either path, from inputs that stay in place; half of the tokens are trained."""

    def __init__(self, tokens: int, dtype: torch.dtype = torch.bfloat16, vocab: int = V) -> None:
        self.hidden = normal(tokens, D, dtype=dtype).requires_grad_()
        self.weight = normal(vocab, D, seed=1, dtype=dtype, scale=0.2).requires_grad_()
        self.labels = torch.arange(tokens, device="cuda") * 31 % vocab
        self.mask = torch.arange(tokens, device="cuda") % 2 == 0
        self.advantages = normal(tokens, seed=2)

    def linear(self, **options) -> list[Tensor]:
        options = {"loss_mask": self.mask, "impl": "triton"} | options
        out = kdloss.linear_token_logprobs_and_entropy(self.hidden, self.weight, self.labels, **options)
        loss = token_loss(*out, self.advantages).sum()
        return [x.detach() for x in out] + list(torch.autograd.grad(loss, (self.hidden, self.weight)))

    def fused(self, **options) -> list[Tensor]:
        options = {"loss_mask": self.mask, "impl": "triton"} | options
        inputs = (self.hidden, self.weight, self.labels, token_loss, self.advantages)
        out = kdloss.fused_linear_loss(*inputs, **options)
        return [x.detach() for x in out] + list(torch.autograd.grad(out.loss, (self.hidden, self.weight)))


PATHS: dict[str, Callable[..., list[Tensor]]] = {"linear": Step.linear, "fused": Step.fused}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request):
    return request.param


def test_auto_takes_the_kernels_on_a_gpu(path):
    step = Step(64)
    assert all(torch.equal(x, y) for x, y in zip(path(step), path(step, impl="auto"), strict=True))


@pytest.mark.parametrize("tokens", [1, 100, 2048])
def test_the_same_as_by_torch(path, tokens):
    step = Step(tokens)
    for x, y in zip(path(step), path(step, impl="torch"), strict=True):
        # in bfloat16 the kernels round the gradient of a logit before the product, and torch's path widens it
        bound = 1e-4 if x.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(x.float(), y.float(), rtol=bound, atol=bound * float(y.abs().max()))


@pytest.mark.parametrize("kept_bytes", [0, 1 << 40])
def test_the_same_bits_twice(path, kept_bytes, monkeypatch):
    monkeypatch.setattr(from_hidden, "DEVICE_KEPT_BYTES", kept_bytes)
    step = Step(1000)
    assert all(torch.equal(x, y) for x, y in zip(path(step), path(step), strict=True))


def test_a_static_bound_waits_for_nothing(path):
    step = Step(512)
    plain, _ = path(step), path(step, max_trained_tokens=300)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = path(step, max_trained_tokens=300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(found, plain, strict=True):
        torch.testing.assert_close(x, y)


def test_a_graph_replays_a_step_on_new_inputs(path):
    """Captured once; replayed with another mask, labels and hidden states, more trained tokens, and too many."""
    step, fresh = Step(512), Step(512)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            path(step, max_trained_tokens=400)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = path(step, max_trained_tokens=400)
    fresh.hidden = normal(512, D, seed=9, dtype=torch.bfloat16).requires_grad_()
    fresh.labels = fresh.labels.flip(0)
    fresh.mask = torch.arange(512, device="cuda") % 4 != 0
    with torch.no_grad():
        step.hidden.copy_(fresh.hidden)
        step.labels.copy_(fresh.labels)
        step.mask.copy_(fresh.mask)
    graph.replay()
    for x, y in zip(captured, path(fresh), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2 * float(y.abs().max()))
    step.mask.fill_(True)
    graph.replay()
    assert captured[0].isnan().any()


def test_logits_take_no_more_than_their_slices(monkeypatch):
    monkeypatch.setattr(from_hidden, "DEVICE_KEPT_BYTES", 0)
    step = Step(8192)
    step.mask.fill_(True)
    step.linear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.linear()
    extra = torch.cuda.max_memory_allocated() - before
    # a slice in float32 and its gradient in bfloat16, each rounded up by 255 columns at most; and tensors of the size
    # of inputs: both gradients, dh in float32, the rows that take part, and a few values per token
    slices = 1.5 * (_products.SLICE_BYTES + 4 * 255 * 8192)
    inputs = 2 * (2 * step.hidden.numel() + step.weight.numel()) + 4 * step.hidden.numel() + 256 * 8192
    assert extra <= 1.05 * (slices + inputs)


def test_kept_logits_past_2_to_the_31(monkeypatch):
    """16384 rows of 151936 float32 logits are 2.5e9 entries, 9.3 GiB."""
    monkeypatch.setattr(from_hidden, "DEVICE_KEPT_BYTES", 1 << 40)
    step = Step(16384)
    step.mask.fill_(True)
    kept = step.linear()
    monkeypatch.setattr(from_hidden, "DEVICE_KEPT_BYTES", 0)
    for x, y in zip(kept, step.linear(), strict=True):
        torch.testing.assert_close(x, y)


def test_a_label_outside_the_vocabulary_is_nan_and_reads_nothing(path):
    step = Step(64)
    clean = path(step)
    step.labels[[0, 2]] = torch.tensor([V, -7], device="cuda")
    found = path(step)
    assert found[1 if path is Step.fused else 0][[0, 2]].isnan().all()
    assert found[1 if path is Step.fused else 0][4:].isfinite().all()
    assert all(x.shape == y.shape for x, y in zip(found, clean, strict=True))
