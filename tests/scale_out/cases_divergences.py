"""Divergences of a vocabulary-sharded head: values and gradients equal those of the whole head in one process."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

import kdloss
from kdloss import _divergences
from kdloss._divergences import topk_hidden_op
from kdloss._logprobs import from_hidden
from scale_out.cases_vocabulary import UNEVEN, D, T, V, close, differentiated, part, shards
from scale_out.ranks import Ranks, on

FROM_LOGITS = {
    "forward_kl": kdloss.forward_kl,
    "reverse_kl": kdloss.reverse_kl,
    "generalized_jsd": partial(kdloss.generalized_jsd, beta=0.3),
    "skewed_forward_kl": partial(kdloss.skewed_forward_kl, alpha=0.1),
    "skewed_reverse_kl": partial(kdloss.skewed_reverse_kl, alpha=0.1),
    "total_variation": kdloss.total_variation,
}
FROM_HIDDEN = {
    "forward_kl": kdloss.linear_forward_kl,
    "reverse_kl": kdloss.linear_reverse_kl,
    "generalized_jsd": partial(kdloss.linear_generalized_jsd, beta=0.3),
    "skewed_forward_kl": partial(kdloss.linear_skewed_forward_kl, alpha=0.1),
    "skewed_reverse_kl": partial(kdloss.linear_skewed_reverse_kl, alpha=0.1),
    "total_variation": kdloss.linear_total_variation,
}
TOPK = {
    "forward": kdloss.topk_forward_kl,
    "reverse": kdloss.topk_reverse_kl,
    "jsd": partial(kdloss.topk_generalized_jsd, beta=0.4),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@on(2, 3, 4)
def case_divergences_from_logits(ranks: Ranks) -> None:
    """In blocks of two rows, so there are several blocks."""
    temperatures = torch.linspace(0.5, 2, T)
    for shard in shards(ranks):
        for name, divergence in FROM_LOGITS.items():
            for dtype, options in [
                (torch.float64, {"temperature": temperatures}),
                (torch.float32, {"vocab_size": V - 2}),
                (torch.bfloat16, {"temperature": 0.7}),
            ]:
                logits, teacher = 2 * ranks.normal(T, V, dtype=dtype), 2 * ranks.normal(T, V, seed=1, dtype=dtype)
                teacher[5] = logits[5]  # a divergence of 0
                what = f"{name} {shard} {dtype}"

                def whole(x, f=divergence, teacher=teacher, options=options):
                    return (f(x, teacher, **options),)

                def split(x, f=divergence, teacher=teacher, options=options, shard=shard):
                    return (f(x, part(teacher, shard, -1), shard=shard, **options),)

                with mock.patch.object(_divergences.rows.Scratch, "blocks", _two_rows):
                    expected, (gradient,) = differentiated(whole, [logits])
                    found, (mine,) = differentiated(split, [part(logits, shard, -1)])
                close(found[0], expected[0], wide(dtype), what)
                close(mine, part(gradient, shard, -1), dtype, f"gradient {what}")
                ranks.same_bits(*found)


def _two_rows(self, total_rows):
    return (slice(start, start + 2) for start in range(0, total_rows, 2))


@on(2, 3)
def case_hostile_divergences(ranks: Ranks) -> None:
    """Whole slices of mass 0 on either side, rows that are no distribution, and logits far from 0."""
    shard = kdloss.VocabShard(*UNEVEN[ranks.size][ranks.rank], ranks.group)
    logits, teacher = ranks.normal(8, V), ranks.normal(8, V, seed=1)
    logits[0, 17:] = teacher[0, 17:] = -torch.inf
    logits[1, 17:] = -torch.inf
    teacher[2, :17] = -torch.inf
    logits[3] = -torch.inf
    teacher[4, 20] = torch.inf
    logits[5, 0] = torch.nan
    logits[6] += 3e4
    teacher[6] -= 3e4
    logits[7, 3] = -torch.inf
    for name, divergence in FROM_LOGITS.items():
        found = divergence(part(logits, shard, -1), part(teacher, shard, -1), shard=shard)
        close(found, divergence(logits, teacher), torch.float32, name)

        def finite(x, t, f=divergence, shard=None):
            value = f(x, t, shard=shard)
            return (torch.where(value.isfinite(), value, 0),)  # rows without an incoming gradient get 0

        _, (expected,) = differentiated(partial(finite, t=teacher), [logits])
        _, (mine,) = differentiated(partial(finite, t=part(teacher, shard, -1), shard=shard), [part(logits, shard, -1)])
        close(mine, part(expected, shard, -1), torch.float32, f"gradient {name}")


@on(2, 3, 4)
def case_divergences_from_hidden_states(ranks: Ranks) -> None:
    """Heads of different widths and dtypes, in chunks of two rows; the head trained, and frozen."""
    mask = torch.ones(T, dtype=torch.bool)
    mask[[0, 7]] = False
    for shard in shards(ranks):
        for name, divergence in FROM_HIDDEN.items():
            for dtype, options in [
                (torch.float64, {"softcap": 2.0, "logit_scale": 1.3, "temperature": torch.linspace(0.5, 2, T)}),
                (torch.float32, {"vocab_size": V - 2, "teacher_softcap": 3.0}),
            ]:
                hidden, weight = ranks.normal(T, D, dtype=dtype), ranks.normal(V, D, seed=1, dtype=dtype)
                bias, teacher_hidden = ranks.normal(V, seed=2, dtype=dtype), ranks.normal(T, 5, seed=3)
                teacher_weight, teacher_bias = ranks.normal(V, 5, seed=4).bfloat16(), ranks.normal(V, seed=5)
                hidden[0] = teacher_hidden[7] = torch.nan

                def call(h, w, b, f=divergence, teacher=(teacher_hidden, teacher_weight, teacher_bias), **options):
                    x, y, z = teacher
                    return (f(h, w, x, y, loss_mask=mask, bias=b, teacher_bias=z, **options),)

                mine = (teacher_hidden, part(teacher_weight, shard, 0), part(teacher_bias, shard, 0))
                with mock.patch.dict(_divergences.hidden_passes._CHUNK_ENTRIES, cpu=2 * V):
                    expected, gradients = differentiated(partial(call, **options), [hidden, weight, bias])
                    found, own = differentiated(
                        partial(call, teacher=mine, shard=shard, **options),
                        [hidden, part(weight, shard, 0), part(bias, shard, 0)],
                    )
                    frozen = partial(call, w=part(weight, shard, 0), b=None, teacher=mine, shard=shard, **options)
                    _, (dh,) = differentiated(frozen, [hidden])
                    _, (dh_whole,) = differentiated(partial(call, w=weight, b=None, **options), [hidden])
                what = f"{name} {shard} {dtype}"
                close(found[0], expected[0], dtype, what)
                close(own[0], gradients[0], dtype, f"dh {what}")
                close(own[1], part(gradients[1], shard, 0), dtype, f"dw {what}")
                close(own[2], part(gradients[2], shard, 0), dtype, f"db {what}")
                close(dh, dh_whole, dtype, f"dh, frozen {what}")
                ranks.same_bits(*found, own[0])


@on(2, 3)
def case_topk_from_hidden_states(ranks: Ranks) -> None:
    """In tiles of two rows and three columns, computed again or kept; ids in one slice or in several; padding alone."""
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:5] for i in range(T)])
    ids[1], ids[2] = torch.tensor([22, 21, 20, -1, -1]), -1
    mask = torch.arange(T) != 7
    for shard in shards(ranks):
        hidden, weight, bias = (ranks.normal(*shape, seed=n).double() for n, shape in enumerate([(T, D), (V, D), (V,)]))
        hidden[7] = torch.nan
        kept = (2 * ranks.normal(T, V, seed=3).double()).log_softmax(-1).gather(-1, ids.clamp(min=0))
        for name, tail in (("forward_kl", "bucket"), ("reverse_kl", "renormalize"), ("reverse_kl", "generalized")):

            def call(h, w, b, name=name, tail=tail, kept=kept, shard=None):
                function = getattr(kdloss, f"linear_topk_{name}")
                return (function(h, w, kept, ids, loss_mask=mask, tail=tail, bias=b, softcap=2.0, shard=shard),)

            expected, gradients = differentiated(call, [hidden, weight, bias])
            local = [hidden, part(weight, shard, 0), part(bias, shard, 0)]
            kept_bytes = 0 if tail == "generalized" else 1 << 20
            tiles = mock.patch.multiple(topk_hidden_op, _TILE_ENTRIES=0, _TILE_ROWS=2, _TILE_COLUMNS=3)
            with tiles, mock.patch.object(from_hidden, "KEPT_BYTES", kept_bytes):
                found, own = differentiated(partial(call, shard=shard), local)
            what = f"{name} {tail} {shard}"
            close(found[0], expected[0], torch.float64, what)
            close(own[0], gradients[0], torch.float64, f"dh {what}")
            close(own[1], part(gradients[1], shard, 0), torch.float64, f"dw {what}")
            close(own[2], part(gradients[2], shard, 0), torch.float64, f"db {what}")
            ranks.same_bits(*found, own[0])


@on(2, 3)
def case_topk_and_samples(ranks: Ranks) -> None:
    """From logits and from hidden states; samples in S, outside it, and ignored ones; a row of padding."""
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:5] for i in range(T)])
    ids[1], ids[2] = torch.tensor([22, 21, 20, -1, -1]), -1
    labels = torch.stack([ids[:, 0].clamp(min=0), torch.arange(T) % V], -1)
    labels[3, 1] = labels[4, 0] = labels[4, 1] = -100
    mask = (torch.arange(T) != 7) & (labels[:, 1] != -100)
    log_p = (2 * ranks.normal(T, V, seed=3).double()).log_softmax(-1)
    kept, sampled = log_p.gather(-1, ids.clamp(min=0)), log_p.gather(-1, labels.clamp(min=0))
    teacher = (labels, sampled, kept, ids)
    old_logp = sampled - 0.3
    hidden, weight = ranks.normal(T, D).double(), ranks.normal(V, D, seed=1).double()
    hidden[7] = torch.nan
    options = {"old_logp": old_logp, "max_ratio": 2.0}

    def of_hidden(h, w, shard=None):
        one = (labels[:, 1], sampled[:, 1], kept, ids)
        return (kdloss.linear_topk_sampled_reverse_kl(h, w, *one, loss_mask=mask, shard=shard),)

    def of_logits(x, shard=None):
        return (kdloss.topk_sampled_reverse_kl(x, *teacher, temperature=0.8, shard=shard, **options),)

    logits = 2 * ranks.normal(T, V, seed=4).double()
    for shard in shards(ranks):
        expected, (gradient,) = differentiated(of_logits, [logits])
        found, (mine,) = differentiated(partial(of_logits, shard=shard), [part(logits, shard, -1)])
        close(found[0], expected[0], torch.float64, f"sampled {shard}")
        close(mine, part(gradient, shard, -1), torch.float64, f"gradient, sampled {shard}")
        ranks.same_bits(*found)
        expected, gradients = differentiated(of_hidden, [hidden, weight])
        found, own = differentiated(partial(of_hidden, shard=shard), [hidden, part(weight, shard, 0)])
        close(found[0], expected[0], torch.float64, f"linear, sampled {shard}")
        close(own[0], gradients[0], torch.float64, f"dh, sampled {shard}")
        close(own[1], part(gradients[1], shard, 0), torch.float64, f"dw, sampled {shard}")
        ranks.same_bits(*found, own[0])


@on(2, 3, 4)
def case_topk(ranks: Ranks) -> None:
    """Ids in one slice, in several slices, all ids, no id, and fewer than K."""
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:5] for i in range(T)])
    ids[1] = torch.tensor([22, 21, 20, -1, -1])
    ids[2] = -1
    for shard in shards(ranks):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits = 2 * ranks.normal(T, V, dtype=dtype)
            teacher_logp = (2 * ranks.normal(T, V, seed=1, dtype=wide(dtype))).log_softmax(-1)
            kept = teacher_logp.gather(-1, ids.clamp(min=0))
            everything = torch.arange(V).expand(T, V)
            for name, divergence in TOPK.items():
                for tail in ("bucket", "renormalize", "truncate"):
                    for which, of in ((ids, kept), (everything, teacher_logp)):

                        def call(x, f=divergence, of=of, which=which, tail=tail, shard=None):
                            return (f(x, of, which, tail=tail, temperature=0.8, shard=shard),)

                        expected, (gradient,) = differentiated(call, [logits])
                        found, (mine,) = differentiated(partial(call, shard=shard), [part(logits, shard, -1)])
                        what = f"{name} {tail} {shard} {dtype}"
                        close(found[0], expected[0], wide(dtype), what)
                        close(mine, part(gradient, shard, -1), dtype, f"gradient {what}")
                        ranks.same_bits(*found)


@on(2, 3)
def case_baselines_and_statistics_of_a_top_k(ranks: Ranks) -> None:
    """Eagerly and compiled, with equal bits on every rank."""
    logits, teacher, behaviour = (2 * ranks.normal(T, V, seed=seed, dtype=torch.float64) for seed in range(3))
    top = teacher.log_softmax(-1).topk(5)
    labels, mask = torch.arange(T), torch.arange(T) != 2
    for shard in shards(ranks):
        mine = [part(x, shard, -1) for x in (logits, teacher, behaviour)]

        def baseline(x, y, z, shard=None):
            return kdloss.reverse_kl_baseline(x, y, kind="optimal", behaviour_logits=z, temperature=0.8, shard=shard)

        def statistics(x, shard=None):
            found = kdloss.topk_diagnostics(x, labels, top.values, top.indices, loss_mask=mask, shard=shard)
            return torch.stack([*found.values()])

        for call, whole, given in (
            (baseline, (logits, teacher, behaviour), mine),
            (statistics, (logits,), mine[:1]),
        ):
            expected, runs = call(*whole), [partial(call, shard=shard)]
            if ranks.size == 2:
                runs.append(torch.compile(runs[0], fullgraph=True, backend="aot_eager"))
            for found in (run(*given) for run in runs):
                close(found, expected, torch.float64, f"{call.__name__} {shard}")
                ranks.same_bits(found)


@on(3)
def case_topk_kernels(ranks: Ranks) -> None:
    """Interpreted kernels on slices give the values of torch's path on whole rows, and the same bits on every rank."""
    ids = torch.tensor([[22, 3, 4, 11], [21, 5, -1, -1], [-1, -1, -1, -1]])
    logits, teacher = 2 * ranks.normal(3, V), (2 * ranks.normal(3, V, seed=1)).log_softmax(-1)
    kept = teacher.gather(-1, ids.clamp(min=0))
    for shard in shards(ranks):
        for tail, divergence in zip(("bucket", "renormalize", "truncate"), TOPK.values(), strict=True):

            def call(x, f=divergence, tail=tail, **options):
                return (f(x, kept, ids, tail=tail, temperature=0.8, **options),)

            expected, (gradient,) = differentiated(partial(call, impl="torch"), [logits])
            found, (mine,) = differentiated(partial(call, shard=shard, impl="triton"), [part(logits, shard, -1)])
            close(found[0], expected[0], torch.float32, f"{tail} {shard}")
            close(mine, part(gradient, shard, -1), torch.float32, f"gradient {tail} {shard}")
            ranks.same_bits(*found)
