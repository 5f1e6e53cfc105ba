"""Holds which losses `audit` and `expected_gradient` take and refuse: coupled, stochastic, in place, modules."""

from __future__ import annotations

import itertools
import random
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kdloss
from kdloss.testing import SequenceTree, audit, expected_gradient

RATIO = torch.linspace(0.1, 2.0, 500, dtype=torch.float64)


@pytest.fixture(scope="module")
def tree():
    return SequenceTree(max_length=2, eos=0, prompt_lengths=(1, 2), seed=1)


def both(loss, tree, match, **keywords):
    """Both functions refuse a loss: the auditor, and `expected_gradient` at the other policy's samples."""
    for call in (audit, partial(expected_gradient, under="behaviour")):
        with pytest.raises(ValueError, match=match):
            call(loss, tree, **keywords)


def test_what_is_written_to_a_batch_reaches_no_other(tree):
    first, again = tree.batch([0, 1]).named(), tree.batch([0, 1]).named()
    for name in first:
        first[name].detach().zero_()
    later = tree.batch([0, 1]).named()
    for name in first:
        assert torch.equal(later[name].nan_to_num(9), again[name].nan_to_num(9)), name


def trained(x, loss_mask):
    return x[loss_mask]


def surrogate(logp, old_logp, advantages):
    return -(logp - old_logp).exp() * advantages


def zero_with_gradient(x):
    return x - x.detach()


# each couples the batch in another way: (what the other sequences change)
COUPLED = {
    "centred advantages": lambda logp, old_logp, advantages: surrogate(logp, old_logp, advantages - advantages.mean()),
    "a local token count": lambda logp, old_logp, advantages, loss_mask: (
        surrogate(logp, old_logp, advantages) / loss_mask.sum()
    ),
    "the number of sequences": lambda logp, cu_seqlens: logp / (len(cu_seqlens) - 1),
    "the longest response": lambda logp, lengths: logp / lengths.max(),
    "another sequence's reward": lambda logp, rewards: logp * rewards[0],
    "the position in the stream": lambda logp: logp * RATIO[: len(logp)],
    "the last position": lambda logp: logp * RATIO[: len(logp)].flip(0),
    "a maximum": lambda logp, loss_mask: logp / trained(logp, loss_mask).detach().abs().max(),
    "a small share": lambda logp, advantages: -logp * (advantages - 1e-4 * advantages.mean()),
    "a smaller share": lambda logp, advantages: -logp * (advantages - 1e-5 * advantages.mean()),
    "the gradient alone": lambda logp, loss_mask: logp + zero_with_gradient(trained(logp, loss_mask).mean()),
    "the gradient alone, a small share": lambda logp, loss_mask: (
        logp + 1e-4 * zero_with_gradient(trained(logp, loss_mask).mean())
    ),
    # summed over all sequences, each equally often, this is the gradient of the sum of logp
    "the gradient alone, shared out": lambda logp, loss_mask: (
        logp.detach() + zero_with_gradient(trained(logp, loss_mask).mean())
    ),
    "the value alone, a small share": lambda logp, rewards: logp + 1e-4 * rewards.mean(),
    # the mean ratio is 1 for the student's own samples, and so is its share of the gradient
    "the mean ratio, detached": lambda logp, old_logp, advantages, loss_mask: (
        -advantages * logp * trained(logp - old_logp, loss_mask).exp().mean().detach()
    ),
    # the sum over a sequence does not change, only how its tokens share it
    "shares within a sequence": lambda logp, rewards, loss_mask: torch.where(
        loss_mask, logp + rewards.mean() * (RATIO[: len(logp)] - RATIO[: len(logp)].flip(0)), 0.0
    ),
    "pairs of sequences": lambda logp, rewards, cu_seqlens: (
        logp
        * kdloss.broadcast_to_tokens(
            kdloss.leave_one_out_advantages(rewards, group_size=2), cu_seqlens=cu_seqlens, total_tokens=len(logp)
        )
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_per_token_loss_that_couples_the_batch_gets_no_verdict(tree, name):
    match = "return a scalar and pass batch_size=2" if name == "pairs of sequences" else "couples the sequences"
    both(COUPLED[name], tree, match)


def test_the_scalar_form_of_a_coupled_loss_is_enumerated(tree):
    """Rewards minus the mean of two: each sequence keeps half of its own reward, and the other's has no gradient."""

    def centred(logp, old_logp, advantages, rewards, loss_mask):
        per_token = surrogate(logp, old_logp, advantages - rewards.mean())
        return per_token[loss_mask].sum() / 2

    report = audit(centred, tree, batch_size=2)
    assert report.on_policy.coefficients == {"expected reward": pytest.approx(0.5)}
    # alone, every advantage is zero; the report says that the batch is what lacks
    alone = audit(lambda logp, rewards, loss_mask: -(rewards - rewards.mean())[0] * logp[loss_mask].sum(), tree)
    assert alone.on_policy.why_zero.startswith("a gradient of zero in every batch")
    assert any("so pass batch_size=2" in sentence for sentence in alone.verdicts)


def test_a_scalar_loss_that_adds_sequences_up_needs_no_other_batch_size(tree):
    def reinforce(logp, rewards, loss_mask, cu_seqlens, reduce):
        bounds = itertools.pairwise(cu_seqlens.tolist())
        sums = torch.stack([logp[start:stop][loss_mask[start:stop]].sum() for start, stop in bounds])
        return reduce(-rewards * sums)

    for reduce in (torch.sum, torch.mean):
        report = audit(partial(reinforce, reduce=reduce), tree)
        assert report.on_policy.coefficients == {"expected reward": pytest.approx(1)}
        assert not report.notes
    assert "batches of one sequence" in str(audit(kdloss.grpo_loss, tree))  # its default divides by the local count


def mean_of_a_batch(logp, old_logp, teacher_logp, loss_mask, normalizer=None):
    out = kdloss.distillation_loss(logp, old_logp, teacher_logp, loss_mask=loss_mask, normalizer=normalizer)
    return out.loss


def test_more_batches_than_an_audit_enumerates_are_refused_before_they_are_called(tree):
    calls = []

    def loss(logp, loss_mask):
        calls.append(0)
        return logp[loss_mask].mean()

    both(loss, tree, "64 of the tree's 14 sequences make about 1e73 batches", batch_size=64)
    assert len(calls) == 2
    both(loss, tree, "2000 of the tree's 14 sequences make about 1e2292 batches", batch_size=2000)
    with pytest.raises(ValueError, match="4 of the tree's 14 sequences make 38,416 batches, more than 30,000"):
        audit(loss, tree, batch_size=4)
    audit(lambda logp: logp, tree, batch_size=64)  # a per-token loss is called on all sequences at once


def test_each_way_out_of_too_many_batches_works(monkeypatch):
    """With a lower limit, so that what it allows takes a second."""
    monkeypatch.setattr("kdloss.testing._audit.moments.MOST_BATCHES", 100)
    tree = SequenceTree(max_length=2, eos=0)
    with pytest.raises(ValueError, match="343 batches, more than 100") as caught:
        audit(mean_of_a_batch, tree, batch_size=3)
    largest, small, of_small = re.search(
        r"pass batch_size=(\d+), or take a smaller tree\. (.*) allows batch_size=(\d+)", str(caught.value)
    ).groups()
    assert (largest, of_small) == ("2", "3")
    small_tree = eval(small, {"SequenceTree": SequenceTree})
    # a count that is the same for every batch would hide what it does
    assert len({len(tokens) for _, tokens in small_tree.sequences}) > 1
    for tree_, size in ((tree, int(largest)), (small_tree, int(of_small))):
        assert not audit(mean_of_a_batch, tree_, batch_size=size).on_policy.coefficients
        with pytest.raises(ValueError, match="more than 100"):
            audit(mean_of_a_batch, tree_, batch_size=size + 1)
    assert "a fixed one (normalizer=1) needs no more than batch_size=1" in str(caught.value)
    alone = audit(mean_of_a_batch, tree, normalizer=1, batch_size=1)
    assert alone.on_policy.coefficients == {"reverse KL (token)": pytest.approx(1)}
    assert not any("batches of one sequence" in note for note in alone.notes)
    # no size but 1 fits this tree
    with pytest.raises(ValueError, match="more than 100: take a smaller tree"):
        audit(mean_of_a_batch, SequenceTree(vocab_size=4), batch_size=2)


@pytest.mark.parametrize("size", [1, 2])
def test_a_token_count_in_the_denominator_is_named_where_nothing_fits(size):
    tree, said = SequenceTree(max_length=2, eos=0), "its denominator is the token count of the batch"
    report = audit(kdloss.distillation_loss, tree, batch_size=size)
    assert not report.on_policy.coefficients
    (note,) = (note for note in report.notes if note.startswith(said))
    assert "with a fixed one (normalizer=1)" in note
    fixed = audit(kdloss.distillation_loss, tree, batch_size=size, normalizer=1)
    assert fixed.on_policy.coefficients == {"reverse KL (token)": pytest.approx(size)}
    assert said not in str(fixed)

    def own(logp, teacher_logp, loss_mask):  # without such an argument
        return ((logp - teacher_logp)[loss_mask] ** 2).mean()

    assert f"{said}, which couples the sequences; with a fixed one it may be" in str(audit(own, tree, batch_size=size))

    def centred(logp, rewards, loss_mask, cu_seqlens):  # coupled, but not by a count
        centred = (rewards - 0.5 * rewards.mean()) ** 3
        return -(torch.repeat_interleave(centred, cu_seqlens.diff()) * logp)[loss_mask].sum()

    assert said not in str(audit(centred, tree, batch_size=size))


def test_a_loss_that_is_nan_for_two_sequences_couples_them():
    """Rewards divided by their standard deviation, which is 0 where the two are equal."""

    def loss(logp, rewards, loss_mask, cu_seqlens):
        alone = len(rewards) == 1
        scaled = rewards if alone else (rewards - rewards.mean()) / rewards.std(correction=0)
        return -(torch.repeat_interleave(scaled, cu_seqlens.diff()) * logp)[loss_mask].sum()

    solved = SequenceTree(max_length=2, eos=0, rewards=torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    assert "batches of one sequence" in str(audit(loss, solved))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "loss",
    [
        lambda logp, old_logp, teacher_logp: (teacher_logp - logp).exp() - 1 - (teacher_logp - logp),
        lambda logp, old_logp, teacher_logp: -(logp - old_logp).exp() * torch.sigmoid(teacher_logp - logp).detach(),
        lambda logp, old_logp, teacher_logp: (logp - teacher_logp) ** 2 / 2 + 1000,
        lambda logp, old_logp, teacher_logp: (logp - teacher_logp.logsumexp(0) + teacher_logp.exp().sum().log()) ** 2,
    ],
)
def test_rounding_is_no_coupling(dtype, loss):
    """Functions that are vectorised round the last tokens of a stream in another way than the others.

    The last loss adds and subtracts a sum over the stream: a term that is zero up to rounding.
    """
    tree = SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 3), seed=5)

    def cast(logp, old_logp, teacher_logp, loss_mask):
        return loss(*(torch.where(loss_mask, x, 0.0).to(dtype) for x in (logp, old_logp, teacher_logp)))

    audit(cast, tree)
    expected_gradient(cast, tree)


def test_positions_within_a_sequence_are_no_coupling(tree):
    def discounted(logp, advantages, loss_mask, cu_seqlens):
        place = torch.arange(len(logp)) - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        return -logp * advantages * 0.5**place

    audit(discounted, tree)


def test_a_coupling_below_rtol_is_below_what_the_verdict_leaves(tree):
    loss = COUPLED["a smaller share"]
    assert audit(loss, tree, rtol=1e-3).on_policy.coefficients == {"expected reward": pytest.approx(1, rel=1e-3)}


class Dropout(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.dropout = torch.nn.Dropout(p)

    def forward(self, logp, advantages):
        return -self.dropout(advantages) * logp


def counted(state):
    def loss(logp, advantages):
        state.append(0)
        return -advantages * logp * len(state)

    return loss


STOCHASTIC = {
    "noise": lambda logp, advantages: -advantages * logp * torch.rand((), dtype=torch.float64),
    "small noise": lambda logp, advantages: -(advantages + 1e-4 * torch.randn(logp.shape)) * logp,
    "noise in the value alone": lambda logp: logp + torch.rand((), dtype=torch.float64),
    "noise in the gradient alone": lambda logp: logp.detach() + zero_with_gradient(logp) * torch.rand(()),
    "one call in four": lambda logp: logp * (1 if random.random() < 0.75 else 2),
    "a scalar": lambda logp, loss_mask: logp[loss_mask].sum() * torch.rand(()),
    "noise on a difference of the batch": lambda logp, rewards, loss_mask: (
        logp[loss_mask].sum() * (rewards - rewards.mean())[0] * torch.rand(())
    ),
    "dropout": Dropout(0.5),
    "a state": counted([]),
}


# the noise on a difference of the batch is zero for one sequence
@pytest.mark.parametrize(
    ("name", "batch_size"),
    [pair for pair in itertools.product(STOCHASTIC, (1, 2)) if pair != ("noise on a difference of the batch", 1)],
)
def test_a_stochastic_loss_gets_no_verdict(tree, name, batch_size):
    random.seed(0)
    torch.manual_seed(0)
    both(STOCHASTIC[name], tree, "stochastic.*called twice with the same batch", batch_size=batch_size)


def test_the_global_generator_is_left_as_it_was(tree):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    audit(kdloss.kl_k2, tree)
    assert torch.equal(before, torch.get_rng_state())


def test_a_module_is_called_by_the_names_of_its_forward(tree):
    quiet = Dropout(0.5).eval()
    for loss in (quiet, partial(quiet), torch.compile(quiet, backend="eager"), quiet.forward):
        assert audit(loss, tree).on_policy.coefficients == {"expected reward": pytest.approx(1)}

    class Scaled(torch.nn.Module):
        def forward(self, logp, advantages, scale):
            return -scale * advantages * logp

    assert audit(partial(Scaled(), scale=2.0), tree).on_policy.coefficients == {"expected reward": pytest.approx(2)}
    with pytest.raises(TypeError, match="the loss needs scale, which a batch does not have"):
        audit(Scaled(), tree)


def test_a_parameter_that_no_batch_has_is_bound(tree):
    with pytest.raises(TypeError, match=r"functools\.partial\(loss, distill_loss_weight=1\.0\)$"):
        audit(kdloss.kdrl_loss, tree)
    bound = partial(kdloss.kdrl_loss, distill_loss_weight=1.0)
    assert not audit(bound, tree).on_policy.is_zero


def test_a_parameter_with_another_name_for_a_field_is_renamed(tree):
    def loss(logprobs, ref_logprobs, mask, beta):
        return torch.where(mask, beta * (logprobs - ref_logprobs) ** 2 / 2, 0.0)

    with pytest.raises(TypeError, match="which a batch does not have") as caught:
        audit(loss, tree)
    names = dict(re.findall(r"rename (\w+) to (\w+)", str(caught.value)))
    assert names == {"logprobs": "logp", "ref_logprobs": "teacher_logp", "mask": "loss_mask"}
    assert "; bind a number with functools.partial(loss, beta=1.0)" in str(caught.value)

    def wrapped(logp, teacher_logp, loss_mask):
        return loss(logp, teacher_logp, loss_mask, beta=1.0)

    assert audit(wrapped, tree).on_policy.coefficients == {"reverse KL (token)": pytest.approx(1)}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("teacher_logprobs", "teacher_logp"),
        ("old_log_probs", "old_logp"),
        ("log_p", "logp"),
        ("student_logits", "logits"),
        ("response_mask", "loss_mask"),
        ("reward", "rewards"),
        ("advantage", "advantages"),
        *((name, None) for name in ("scale", "weight", "beta", "clip_low", "temperature", "target", "p")),
    ],
)
def test_a_near_miss_of_a_name(tree, name, field):
    loss = eval(f"lambda {name}: 0")
    with pytest.raises(TypeError, match=f"rename {name} to {field}" if field else f"partial.loss, {name}=1.0"):
        audit(loss, tree)


def test_a_field_that_the_loss_takes_already_is_no_new_name(tree):
    with pytest.raises(TypeError, match=r"does not have") as caught:
        audit(lambda loss_mask, mask, log_p, log_prob: 0, tree)
    assert re.findall(r"rename (\w+) to (\w+)", str(caught.value)) == [("log_p", "logp")]


def test_a_callable_object_is_taken(tree):
    class Callable:
        def __call__(self, logp, advantages):
            return -advantages * logp

    assert audit(Callable(), tree).on_policy.coefficients == {"expected reward": pytest.approx(1)}


def test_a_function_without_a_signature_is_refused_by_name(tree):
    with pytest.raises(TypeError, match="no signature to read: name its arguments"):
        audit(torch.neg, tree)


def used_up(logp, advantages):
    """Fails in a second call with the same batch."""
    if not advantages.any():
        raise ValueError("no advantages")
    value = logp * advantages.clone()
    advantages.zero_()
    return value


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda logp, advantages: logp * advantages.sub_(advantages.mean()), "changes advantages in place"),
        (lambda logp, loss_mask: logp.masked_fill_(~loss_mask, 0.0), "changes logp in place"),
        (used_up, "changes advantages in place"),
        (lambda logp, advantages: logp * advantages.data.add_(1), "writes to its arguments: called twice"),
    ],
)
def test_a_loss_that_writes_to_its_arguments_is_refused(tree, loss, match):
    both(loss, tree, match)


def test_a_loss_that_writes_to_a_copy_is_taken(tree):
    def loss(logp, advantages, loss_mask):
        return (-advantages * logp).clone().masked_fill_(~loss_mask, 0.0)

    assert audit(loss, tree).on_policy.coefficients == {"expected reward": pytest.approx(1)}


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda logp: (logp, {}), "must return a tensor .* got tuple"),
        (lambda logp: 0.0, "must return a tensor .* got float"),
        (lambda labels: labels, "must return floating-point values, got torch.int64"),
        (lambda logp: logp[None], r"must return \(T,\)"),
    ],
)
def test_what_is_no_loss_is_named(tree, loss, match):
    both(loss, tree, match)


def test_a_group_that_lacks_sequences_is_told_to_pass_batch_size(tree):
    def grouped(logp, rewards, loss_mask, cu_seqlens, epsilon=1e-4):
        std = ((rewards - rewards.mean()).square().sum() / (len(rewards) - 1)).sqrt()  # 0 / 0 for one
        advantages = (rewards - rewards.mean()) / (std + epsilon)
        per_token = kdloss.broadcast_to_tokens(advantages, cu_seqlens=cu_seqlens, total_tokens=len(logp))
        return -torch.where(loss_mask, per_token * logp, 0.0).sum()

    both(grouped, tree, "not finite on a batch of one sequence, and finite on one of 2.*pass batch_size=2")
    small = SequenceTree(max_length=1, seed=1)
    assert not audit(grouped, small, batch_size=2).on_policy.is_zero
    # two equal rewards: the batch is large enough, so it is not the reason
    both(partial(grouped, epsilon=0.0), small, "standard deviation of equal rewards", batch_size=2)

    def groups_of_two(logp, rewards, loss_mask):
        kdloss.leave_one_out_advantages(rewards, group_size=2)
        return logp[loss_mask].sum()

    both(groups_of_two, tree, "fails on a batch of 1 and not on one of 2.*pass batch_size=2")
    audit(groups_of_two, small, batch_size=2)


def test_a_loss_that_is_infinite_for_one_sequence_is_not_told_to_pass_batch_size():
    tree = SequenceTree(max_length=2, eos=0)
    tree.teacher[0, 1] = -torch.inf
    both(kdloss.kl_k2, tree, "infinite at this tree's policies")

    def scalar(logp, teacher_logp, loss_mask):
        return ((logp - teacher_logp)[loss_mask] ** 2).sum()

    both(scalar, tree, "infinite at this tree's policies")


def test_the_expected_gradient_is_never_nan(tree):
    with pytest.raises(ValueError, match=r"reads untrained positions.*garbage=0\.0"):
        expected_gradient(lambda logp, loss_mask: (logp * loss_mask).sum(), tree)


# as they are first written, and as the error says
SCALARS = [
    (lambda logp, teacher_logp: (logp - teacher_logp).mean(), lambda x, m: x[m].mean()),
    (
        lambda logp, teacher_logp: F.kl_div(logp, teacher_logp, reduction="sum", log_target=True),
        lambda x, m: torch.where(m, x, 0).sum() / m.sum(),
    ),
    (
        lambda logp, teacher_logp, loss_mask: ((logp - teacher_logp) * loss_mask).sum() / loss_mask.sum(),
        lambda x, loss_mask: torch.where(loss_mask, x, 0).sum() / loss_mask.sum(),
    ),
]


@pytest.mark.parametrize(("first", "reduce"), SCALARS)
def test_a_scalar_that_reads_prompts_is_told_to_select_by_the_mask(tree, first, reduce):
    both(first, tree, r"take an argument loss_mask and select with x\[loss_mask\] or torch\.where\(loss_mask, x, 0\)")

    def mended(logp, teacher_logp, loss_mask):
        return reduce((logp - teacher_logp) ** 2, loss_mask)

    assert audit(mended, tree).on_policy.gradient.isfinite().all()
