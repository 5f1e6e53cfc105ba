"""Holds the operators of log-probs: what autograd keeps, peak memory, and torch's own checks and tools.

What autograd keeps is counted exactly, with saved-tensor hooks; each peak is measured in a fresh process.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._logprobs import from_hidden, hidden_op, logits_op
from kdloss._softmax.rows import RowState, Sums, flat_rows

V, D, T = 11, 6, 9
LABELS = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(0)).index_fill(0, torch.tensor([4]), -100)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# torch's own check of an operator: schema, fake implementation, autograd registration, compilation.


@pytest.mark.slow
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("row_temperature", [None, torch.linspace(0.5, 2, T)])
def test_opcheck_from_logits(with_entropy, row_temperature):
    logits = normal(T, V).requires_grad_()
    arguments = (logits, LABELS[:, None], row_temperature, 1.0, 3.0, V - 1, with_entropy)
    columns = LABELS[:, None].clamp(max=V - 2)
    torch.library.opcheck(logits_op.logprobs.overload, (logits, columns, *arguments[2:]))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, torch.arange(T)])
@pytest.mark.parametrize("store", [False, True])
def test_opcheck_from_hidden_states(rows, store):
    if store and rows is None:
        return  # storing the logits needs the number of rows
    hidden, weight, bias = (x.requires_grad_() for x in (normal(T, D), normal(V, D, seed=1), normal(V, seed=2)))
    options = (None, 0.7, 3.0, 1.2, V, True, False, True, store)
    torch.library.opcheck(hidden_op.linear_logprobs.overload, (hidden, weight, bias, LABELS[:, None], rows, *options))


# What autograd keeps


def kept(call: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        found.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    del result
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_a_few_values_per_row_are_kept(dtype):
    logits = normal(64, 500, dtype=dtype).requires_grad_()
    labels = torch.arange(64)
    tensors = kept(lambda: kdloss.token_logprobs_and_entropy(logits, labels))
    others = [x for x in tensors if x.data_ptr() != logits.data_ptr()]
    assert len(others) < len(tensors)  # the logits, which belong to the caller
    # columns (8 bytes), maximum, peak and mean (4 each), and masks of a byte
    assert sum(x.numel() * x.element_size() for x in others) <= 64 * 32


@pytest.mark.parametrize("budget", [0, 1 << 28])
def test_of_hidden_states_no_logits_are_kept_beyond_the_budget(budget, monkeypatch):
    monkeypatch.setattr(from_hidden, "KEPT_BYTES", budget)
    hidden, weight = normal(64, D).requires_grad_(), normal(500, D, seed=1).requires_grad_()
    tensors = kept(lambda: kdloss.linear_token_logprobs_and_entropy(hidden, weight, torch.arange(64)))
    assert any(x.shape == (64, 500) for x in tensors) == (budget > 0)


PEAK = """
import resource, sys, torch, kdloss
from kdloss._logprobs import from_hidden
torch.set_num_threads(1)
from_hidden.KEPT_BYTES = 0
path, T, V, D = sys.argv[1], 1024, 32768, 64
labels = torch.arange(T)
dtype = torch.bfloat16 if path == "bf16" else torch.float32
if path == "hidden":
    inputs = [torch.randn(n, D).requires_grad_() for n in (T, V)]
    call = lambda n: kdloss.linear_token_logprobs_and_entropy(inputs[0][:n], inputs[1], labels[:n])
else:
    inputs = [torch.randn(T, V).to(dtype).requires_grad_()]
    call = lambda n: kdloss.token_logprobs_and_entropy(inputs[0], labels) if n == T else (
        kdloss.token_logprobs_and_entropy(inputs[0].detach()[:n].requires_grad_(), labels[:n]))
out = call(2)
(out.logp.sum() + out.entropy.sum()).backward()
for x in inputs:
    x.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = call(T)
(out.logp.sum() + out.entropy.sum()).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (T * V * dtype.itemsize))
"""


# From logits, the gradient is 1.0 of them and 0.1 is for scratch. From hidden states, a (T, V) tensor alone would be
# 1.0; a tile of 512 x 8192, two of scratch and the gradients are less than half of that here.
@pytest.mark.slow
@pytest.mark.parametrize(("path", "most"), [("bf16", 1.1), ("fp32", 1.1), ("hidden", 0.6)])
def test_peak_of_extra_memory_in_units_of_the_logits(path, most):
    run = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= most


STEP = """
import sys, torch, kdloss
from kdloss._logprobs import from_hidden
torch.set_num_threads(1)
path, dtype, D = sys.argv[1], getattr(torch, sys.argv[2]), 512
from_hidden.KEPT_BYTES = 1 << 30 if path == "kept" else 0

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def made(T, V):
    # logits of size 1: masses that are subnormal would take most of the time
    return *((torch.randn(n, D) / D**0.25).to(dtype).requires_grad_() for n in (T, V)), torch.arange(T) % V

def step(hidden, weight, labels):
    mask = torch.ones_like(labels, dtype=torch.bool)
    if path == "naive":
        loss = (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None]).sum()
    elif path == "fused":
        loss = kdloss.fused_linear_loss(hidden, weight, labels, lambda logp, entropy: -logp, loss_mask=mask).loss
    else:
        loss = kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=mask).sum()
    loss.backward()

step(*made(4, 300))  # libraries load on first use
inputs = made(1024, 32_000)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
step(*inputs)
print(status("VmHWM") - before)
"""


# float32 logits are 125 MiB, and the gradient of the head 31 MiB in bfloat16 and 63 MiB in float32. Plain torch takes
# 375 MiB in bfloat16, and torch's own `linear_cross_entropy` half of that.
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_from_hidden_states_every_path_needs_less_than_plain_torch(dtype):
    def extra(path: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", STEP, path, dtype], capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    naive = extra("naive")
    assert naive > 300 << 20  # or the measurement is broken
    shares = {path: extra(path) / naive for path in ("kept", "recomputed", "fused")}
    bounds = {"kept": 0.75, "recomputed": 0.4, "fused": 0.75}
    assert all(shares[path] <= most for path, most in bounds.items()), shares


# Operators inside torch's tools


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    hidden, weight = normal(T, D).requires_grad_(), normal(V, D, seed=1).requires_grad_()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = kdloss.linear_token_logprobs_and_entropy(hidden, weight, LABELS)
        return out.logp.sum() + out.entropy.sum() + kdloss.token_logprobs(hidden @ weight.T, LABELS).sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    total = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=reentrant)
    total.backward()
    assert torch.equal(hidden.grad, plain[0])
    assert torch.equal(weight.grad, plain[1])


def test_logits_cut_from_a_batch_are_not_copied():
    """`logits[:, :-1]` of (B, L, V), as trainers write it, is not a matrix: it is processed sequence by sequence."""
    whole = normal(3, 5, V)
    labels = torch.randint(0, V, (3, 4), generator=torch.Generator().manual_seed(1))
    cut = whole[:, :-1]
    assert all(x.data_ptr() - cut.data_ptr() < whole.numel() * 4 for (x,) in flat_rows(cut))
    expected = kdloss.token_logprobs_and_entropy(cut.contiguous(), labels)
    leaf = whole.clone().requires_grad_()
    found = kdloss.token_logprobs_and_entropy(leaf[:, :-1], labels)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    (found.logp.sum() + found.entropy.sum()).backward()
    plain = cut.contiguous().requires_grad_()
    out = kdloss.token_logprobs_and_entropy(plain, labels)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert torch.equal(leaf.grad[:, :-1], plain.grad)
    assert not leaf.grad[:, -1].any()


def test_a_second_derivative_is_refused():
    logits = normal(T, V).requires_grad_()
    (first,) = torch.autograd.grad(kdloss.token_logprobs(logits, LABELS).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), logits)


# The state of a row


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4])
@pytest.mark.parametrize("cuts", [[0, 11], [0, 1, 11], [0, 4, 5, 9, 11]])
@pytest.mark.parametrize("hole", [None, slice(0, 4), slice(4, 5)])
def test_parts_of_a_row_merge_into_it(offset, cuts, hole):
    """Including parts without mass. float64, against the definitions: a few roundings of sums of 11."""
    z = normal(5, V, dtype=torch.float64) + offset
    if hole is not None:
        z[:, hole] = -torch.inf
    state = RowState.empty(5, like=z, with_entropy=True)
    for start, stop in itertools.pairwise(cuts):
        part = z[:, start:stop].clone()
        sums = Sums.empty(5, like=part, with_entropy=True)
        sums.read_(part, torch.empty_like(part), torch.empty_like(part))
        state = state.merge(RowState.of(sums))
    logp = torch.log_softmax(z, -1)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(state.logp(z), logp, **close)
    torch.testing.assert_close(state.entropy(), torch.special.entr(logp.exp()).sum(-1, keepdim=True), **close)


@pytest.mark.parametrize("tile_rows", [1, 2, 100])
@pytest.mark.parametrize("width", [256, 512])
def test_slices_and_tiles_change_only_roundings(tile_rows, width, monkeypatch):
    """Several slices of the vocabulary and tiles of rows, with all incoming gradients and with half of them 0."""
    vocab = 1000
    labels = torch.randint(0, vocab, (T, 2), generator=torch.Generator().manual_seed(3))
    leaves = [normal(n, D, seed=n, dtype=torch.float64).requires_grad_() for n in (T, vocab)]
    upstream = normal(T, 2, seed=9, dtype=torch.float64) * (torch.arange(T) % 2)[:, None]

    def outcome() -> list[Tensor]:
        out = kdloss.linear_token_logprobs_and_entropy(*leaves, labels, softcap=2.0, temperature=0.8)
        pulled = (out.logp * upstream).sum()
        return [
            *out,
            *torch.autograd.grad(pulled, leaves, retain_graph=True),
            *torch.autograd.grad(pulled + out.entropy.sum(), leaves),
        ]

    whole = outcome()
    for kept_bytes in (0, 1 << 28):
        monkeypatch.setattr(from_hidden, "KEPT_BYTES", kept_bytes)
        monkeypatch.setattr(hidden_op, "_CPU", hidden_op._Budget(tile_rows, width, 1 << 23))
        for x, y in zip(outcome(), whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
