"""Kernels of a vocabulary-sharded head on real ranks: torch's values, the same bits on each rank, no more collectives.

`tests/_triton/test_shards.py` tests every option. Here a few rows are interpreted.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor.debug import CommDebugMode

import kdloss
import triton_harness  # noqa: F401  its patch makes interpreted kernels fast
from scale_out.cases_vocabulary import UNEVEN, D, V, close, differentiated, part, token_loss
from scale_out.ranks import Ranks, on

T = 3


@on(3)
def case_kernels(ranks: Ranks) -> None:
    """The values of torch's operations on whole rows in one process, and the collectives that they take on slices."""
    shard = kdloss.VocabShard(*UNEVEN[ranks.size][ranks.rank], ranks.group)
    labels, mask = torch.tensor([22, 4, -100]), torch.tensor([True, True, False])
    logits, hidden, weight = ranks.normal(T, V) * 3, ranks.normal(T, D), ranks.normal(V, D, seed=1)
    old, teacher, others = ranks.normal(T, seed=4) - 3, ranks.normal(T, V, seed=5), ranks.normal(V, D, seed=6)

    def from_logits(x, **more):
        return kdloss.token_logprobs_and_entropy(x, labels, temperature=0.7, **more)

    def from_hidden(h, w, **more):
        return kdloss.linear_token_logprobs_and_entropy(h, w, labels, softcap=2.0, **more)

    def fused(h, w, **more):
        return kdloss.fused_linear_loss(h, w, labels, token_loss, old, old, loss_mask=mask, **more)[:1]

    def divergences(x, shard=None, **more):
        y = teacher if shard is None else part(teacher, shard, -1)
        more |= {"shard": shard, "temperature": 0.7}
        return kdloss.reverse_kl(x, y, **more), kdloss.generalized_jsd(x, y, beta=0.3, **more)

    def linear_divergences(h, w, shard=None, **more):
        y = others if shard is None else part(others, shard, 0)
        more |= {"shard": shard, "temperature": 0.7, "loss_mask": mask}
        kl = kdloss.linear_forward_kl(h, w, hidden.flip(0), y, **more)
        return kl, kdloss.linear_skewed_reverse_kl(h, w, hidden.flip(0), y, alpha=0.3, **more)

    for call, leaves, axes in [
        (from_logits, [logits], [-1]),
        (from_hidden, [hidden, weight], [None, 0]),
        (fused, [hidden, weight], [None, 0]),
        (divergences, [logits], [-1]),
        (linear_divergences, [hidden, weight], [None, 0]),
    ]:
        mine = [x if axis is None else part(x, shard, axis) for x, axis in zip(leaves, axes, strict=True)]
        counts, found = [], []
        for impl in ("torch", "triton"):
            with CommDebugMode() as seen:
                found = differentiated(lambda *x, call=call, impl=impl: call(*x, shard=shard, impl=impl), mine)
            counts.append(seen.get_comm_counts())
        assert counts[0] == counts[1], counts
        expected, gradients = differentiated(call, leaves)
        for x, y in zip(found[0], expected, strict=True):
            close(x, y, torch.float32, call.__name__)
        ranks.same_bits(*found[0])
        for x, y, axis in zip(found[1], gradients, axes, strict=True):
            close(x, y if axis is None else part(y, shard, axis), torch.float32, f"gradient of {call.__name__}")


@on(2)
def case_compiled_kernels(ranks: Ranks) -> None:
    """With fullgraph=True, forward and backward, as in eager mode. An untrained token's temperature may be anything."""
    shard = kdloss.VocabShard.even(V, ranks.group)
    labels, mask = torch.tensor([22, 4, -100]), torch.tensor([True, True, False])
    hidden, weight = ranks.normal(T, D), part(ranks.normal(V, D, seed=1), shard, 0)

    def call(h, w):
        logits = kdloss.token_logprobs_and_entropy(h @ w.T, labels, temperature=0.7, shard=shard, impl="triton")
        more = {"temperature": torch.tensor([0.7, 1.3, torch.nan]), "shard": shard, "impl": "triton"}
        return *logits, kdloss.linear_reverse_kl(h, w, h + 1, w + 1, loss_mask=mask, **more)

    expected, gradients = differentiated(call, [hidden, weight])
    found, mine = differentiated(torch.compile(call, fullgraph=True, backend="aot_eager"), [hidden, weight])
    for x, y in zip([*found, *mine], [*expected, *gradients], strict=True):
        close(x, y, torch.float32, "compiled")
