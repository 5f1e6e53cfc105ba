"""Holds the peak extra memory of divergences: at most 1.1 times the logits, half of the naive form from hidden states.

Each is measured in a fresh process by Linux's high-water mark of resident memory, which is reset before the call: the
inputs are not counted, but memory that is freed during the call is.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

COMMON = """
import json, torch, kdloss
torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def extra(call):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    call()
    return status("VmHWM") - before
"""

FROM_LOGITS = """
dtype, T, V = torch.{dtype}, {T}, {V}
teacher = torch.randn(T, V, dtype=dtype)
ids = torch.arange(20).repeat(T, 1)
logp = torch.full((T, 20), -4.0)
small = torch.randn(2, 30, dtype=dtype, requires_grad=True)

def run(f, logits, *others, **options):
    f(logits, *others, **options).sum().backward()
    logits.grad = None

forms = [("forward_kl", dict()), ("reverse_kl", dict()), ("generalized_jsd", dict(beta=0.5)),
         ("skewed_forward_kl", dict(alpha=0.1)), ("skewed_reverse_kl", dict(alpha=0.1)), ("total_variation", dict())]
logits = torch.randn(T, V, dtype=dtype, requires_grad=True)
found = dict()
for name, share in forms:
    f = getattr(kdloss, name)
    run(f, small, small.detach(), **share)  # libraries load on first use
    found[name] = extra(lambda: run(f, logits, teacher, **share))
for tail in ("bucket", "renormalize", "truncate"):
    f = kdloss.topk_forward_kl
    run(f, small, logp[:2], ids[:2], tail=tail)
    found["topk " + tail] = extra(lambda: run(f, logits, logp, ids, tail=tail))
print(json.dumps({{name: x / (logits.numel() * logits.element_size()) for name, x in found.items()}}))
"""

FROM_HIDDEN = """
dtype, T, V, D = torch.{dtype}, {T}, {V}, 64
hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
head = torch.randn(V, D, dtype=dtype)
mask = torch.ones(T, dtype=torch.bool)
teacher, teacher_head = torch.randn(T, 2 * D, dtype=dtype), torch.randn(V, 2 * D, dtype=dtype)

topk = torch.full((T, 20), -4.0), torch.arange(20).repeat(T, 1)

def ours(name, *given, **options):
    getattr(kdloss, name)(hidden, weight, *given, loss_mask=mask, **options).sum().backward()
    hidden.grad = weight.grad = None

def naive():
    log_q = (hidden @ weight.T).float().log_softmax(-1)
    log_p = (teacher @ teacher_head.T).float().log_softmax(-1)
    (log_q.exp() * (log_q - log_p)).sum().backward()
    hidden.grad = weight.grad = None

def naive_topk():
    logp, ids = topk
    log_q = (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids)
    p, q = logp.exp(), log_q.exp()
    tail = (1 - p.sum(-1)) * ((1 - p.sum(-1)) / (1 - q.sum(-1))).log()
    ((p * (logp - log_q)).sum(-1) + tail).sum().backward()
    hidden.grad = weight.grad = None

found = dict()
both = (teacher, teacher_head)
forms = [("linear_forward_kl", both, dict(), naive), ("linear_reverse_kl", both, dict(), naive),
         ("linear_generalized_jsd", both, dict(beta=0.5), naive),
         ("linear_topk_forward_kl", topk, dict(tail="bucket"), naive_topk)]
for trained in (True, False):
    weight = head.clone().requires_grad_(trained)
    by_hand = {{f: extra(f) for f in (naive, naive_topk)}}
    for name, given, options, beside in forms:
        mask[2:] = False
        ours(name, *given, **options)  # libraries load on first use
        mask[:] = True
        key = name + (" trained" if trained else " frozen")
        found[key] = extra(lambda: ours(name, *given, **options)) / by_hand[beside]
print(json.dumps(found))
"""


def measured(code: str, **names: object) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, "-c", COMMON + code.format(**names)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# a vocabulary with twenty rows per scratch block, and one with a few; the logits are large beside the 2 MB of scratch
@pytest.mark.parametrize(("dtype", "rows", "vocab"), [("float32", 512, 32_000), ("bfloat16", 256, 151_936)])
def test_from_logits_only_the_gradient_is_allocated(dtype, rows, vocab):
    found = measured(FROM_LOGITS, dtype=dtype, T=rows, V=vocab)
    assert len(found) == 9
    # the gradient itself must be measured, or the measurement is broken
    assert all(0.9 < x <= 1.1 for x in found.values()), found


BASELINE = """
sides = [torch.randn({T}, {V}) for _ in range(3)]

def run(student, teacher, behaviour):
    kdloss.reverse_kl_baseline(student, teacher, kind="optimal", behaviour_logits=behaviour)

run(*(x[:2] for x in sides))  # libraries load on first use
print(json.dumps({{"baseline": extra(lambda: run(*sides)) / (4 * {T} * {V})}}))
"""


def test_a_baseline_takes_blocks_of_rows():
    """About ten tensors of 1 MB, beside logits of 64 MB on each of three sides."""
    found = measured(BASELINE, T=512, V=32_000)
    assert 0 < found["baseline"] <= 0.4, found


# the gradient of a float32 head is large beside fewer rows
@pytest.mark.parametrize(("dtype", "rows"), [("float32", 1024), ("bfloat16", 512)])
def test_from_hidden_states_at_most_half_of_the_naive_form(dtype, rows):
    found = measured(FROM_HIDDEN, dtype=dtype, T=rows, V=32_000)
    assert len(found) == 8
    assert all(0 < x <= 0.5 for x in found.values()), found
