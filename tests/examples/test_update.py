"""Holds the update: its gradient is that of the equations and does not depend on how the batch is split."""

import copy
from dataclasses import replace

import pytest
import torch
from opd.loop import backward, update
from opd.models import layout
from opd.rollout import Batch, sample, score
from opd.task import WordProblems
from torch.testing import assert_close

import kdloss

TRAIN = WordProblems(seed=5, held_out=False)
KDRL = kdloss.KDRLConfig(distill_loss_weight=0.5).as_kwargs()


@pytest.fixture
def batch(load, tokenizer) -> Batch:
    student, teacher = load("student"), load("teacher", trained=False)
    torch.manual_seed(1)
    drawn = sample(
        student,
        tokenizer,
        [TRAIN[i] for i in range(4)],
        n_samples=4,
        max_new_tokens=24,
        top_p=1.0,
        device=torch.device("cpu"),
    )
    assert 0 < drawn.rewards.mean() < 1
    return replace(
        drawn,
        advantages=kdloss.group_relative_advantages(drawn.rewards, group_size=4),
        teacher_logp=score(teacher, drawn),
    )


def gradient(student) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def accumulate(student, batch, *, parts=1, sft=False, teacher=None, **loss_kwargs):
    student.zero_grad()
    tokens = (batch.lengths - batch.prompt_lengths).sum()
    normalizer = tokens if loss_kwargs.get("reduction", "token_mean") == "token_mean" else len(batch)
    shares = [
        backward(
            student,
            part,
            tokens=tokens,
            normalizer=normalizer,
            max_weight=2.0,
            sft=sft,
            teacher=teacher,
            **loss_kwargs,
        )
        for part in batch.split(parts)
    ]
    return gradient(student), {name: sum(share[name] for share in shares) for name in shares[0]}


def test_the_gradient_is_that_of_the_equations(load, batch):
    """On-policy, for tokens of whole rows: the mean of -(A + w (log p - log q)) * grad log q, and nothing else."""
    student = load("student")
    given, metrics = accumulate(student, batch, **KDRL)
    student.zero_grad()
    logits = student.lm(batch.input_ids, attention_mask=batch.input_ids != 0).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    at = torch.arange(1, batch.input_ids.shape[1])
    mask = (at >= batch.prompt_lengths[:, None]) & (at < batch.lengths[:, None])
    reward = batch.teacher_logp[:, :-1] - logp.detach()
    loss = -((batch.advantages[:, None] + 0.5 * reward) * logp)[mask].sum() / mask.sum()
    loss.backward()
    assert_close(given, gradient(student), atol=2e-5, rtol=1e-3)
    assert_close(metrics["reverse_kl"], -reward[mask].mean(), atol=1e-5, rtol=1e-4)
    assert metrics["clip_fraction"] == 0
    assert metrics["behaviour_kl"] < 1e-6


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_micro_batches_add_up_to_the_whole(load, batch, reduction):
    student = load("student")
    kwargs = KDRL | {"reduction": reduction}
    whole, metrics = accumulate(student, batch, **kwargs)
    parts, sums = accumulate(student, batch, parts=5, **kwargs)
    assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    assert_close(sums, metrics, atol=1e-5, rtol=1e-4)


def test_sft_descends_the_cross_entropy(load, batch):
    student = load("student")
    given, metrics = accumulate(student, batch, sft=True)
    student.zero_grad()
    where = layout(batch.input_ids, batch.lengths, batch.prompt_lengths)
    logits = student.lm(batch.input_ids, attention_mask=batch.input_ids != 0).logits
    labels = torch.where(where.loss_mask, where.labels, -100)
    loss = torch.nn.functional.cross_entropy(where.pack(logits), labels)
    loss.backward()
    assert_close(given, gradient(student), atol=1e-6, rtol=1e-4)
    assert_close(metrics["loss"], loss.detach())


def test_failed_groups_get_the_forward_kl_and_the_others_the_reward_alone(load, batch):
    student, teacher = load("student"), load("teacher", trained=False)
    failed = torch.arange(len(batch)) < 4  # the first group
    given, metrics = accumulate(student, replace(batch, failed=failed), teacher=teacher, **KDRL)
    student.zero_grad()
    where = layout(batch.input_ids, batch.lengths, batch.prompt_lengths)
    q, p = (
        where.pack(model.lm(batch.input_ids, attention_mask=batch.input_ids != 0).logits).log_softmax(-1)
        for model in (student, teacher)
    )
    logp = q.gather(-1, where.labels.clamp(min=0)[:, None]).squeeze(-1)
    owner = kdloss.segment_ids(where.cu_seqlens, total_tokens=where.total_tokens)
    kl = torch.where(failed[owner], (p.exp() * (p - q)).sum(-1), 0)
    loss = (0.5 * kl - batch.advantages[owner] * logp)[where.loss_mask].sum() / where.loss_mask.sum()
    loss.backward()
    assert_close(given, gradient(student), atol=2e-5, rtol=1e-3)
    parts, sums = accumulate(student, replace(batch, failed=failed), parts=5, teacher=teacher, **KDRL)
    assert_close(parts, given, atol=1e-6, rtol=1e-4)
    assert_close(sums["loss"], metrics["loss"], atol=1e-5, rtol=1e-4)


def test_the_literal_joint_form_has_no_teacher_in_its_gradient(load, batch):
    student = load("student")
    direct = KDRL | {"direct_penalty": True}
    other_teacher = replace(batch, teacher_logp=batch.teacher_logp - 3.0)
    with pytest.warns(UserWarning, match="not in"):
        one, two = (accumulate(student, b, **direct)[0] for b in (batch, other_teacher))
    assert_close(one, two, atol=0, rtol=0)
    assert not torch.allclose(accumulate(student, batch, **KDRL)[0], accumulate(student, other_teacher, **KDRL)[0])


def test_a_stale_batch_is_weighted_by_how_far_the_student_has_moved(load, batch):
    student = load("student")
    stale = replace(batch, old_logp=torch.where(batch.old_logp != 0, batch.old_logp - 0.5, 0.0))
    grpo = kdloss.KDRLConfig(distill_loss_weight=0.0).as_kwargs()
    fresh, _ = accumulate(student, batch, **grpo)
    weighted, metrics = accumulate(student, stale, **grpo)
    assert_close(weighted, fresh * torch.tensor(0.5).exp(), atol=1e-5, rtol=1e-3)  # e^0.5 < 2, the cap
    assert metrics["behaviour_kl"] > 0.1


def test_later_mini_batches_are_clipped_against_the_student_of_before(load, batch):
    student = load("student")
    optimizer = torch.optim.SGD(student.parameters(), lr=3.0)
    metrics = update(student, optimizer, batch, loss_kwargs=KDRL, max_weight=2.0, mini_batches=4, micro_batches=2)
    assert metrics["clip_fraction"] > 0
    assert metrics["behaviour_kl"] > 1e-4
    assert metrics["grad_norm"] > 0


def test_one_update_lowers_the_reverse_kl(load, batch):
    student = load("student")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    before = copy.deepcopy(student)
    distill = kdloss.KDRLConfig(rl_loss_weight=0.0, distill_loss_weight=1.0).as_kwargs()
    for _ in range(3):
        update(student, optimizer, batch, loss_kwargs=distill, max_weight=2.0)
    teacher = batch.teacher_logp.masked_fill(batch.teacher_logp == 0, -torch.inf)
    disliked = (teacher < -5) & teacher.isfinite()
    assert disliked.any()
    assert (score(student, batch) - score(before, batch))[disliked].mean() < 0


def test_the_examples_batches_are_found_sound(load, batch):
    """By check_batch, packed and padded, as they are sampled and after updates that make them stale."""
    student = load("student")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    for steps in range(9):
        where = layout(batch.input_ids, batch.lengths, batch.prompt_lengths)
        with torch.no_grad():
            logp = student(batch.input_ids, batch.lengths, batch.prompt_lengths).logp
        stream = batch.map(where.pack)
        given = {
            "loss_mask": where.loss_mask,
            "labels": kdloss.next_token_labels(stream.input_ids, cu_seqlens=where.cu_seqlens),
            "advantages": kdloss.broadcast_to_tokens(
                batch.advantages, cu_seqlens=where.cu_seqlens, total_tokens=where.total_tokens
            ),
        }
        of_sequences = {"rewards": batch.rewards, "group_size": 4}
        tensors = (logp, stream.old_logp, stream.teacher_logp)
        report = kdloss.check_batch(*tensors, **given, **of_sequences, cu_seqlens=where.cu_seqlens)
        assert report.ok, report
        assert {finding.verdict for finding in report.findings} == {"ok"}

        def rows(x: torch.Tensor) -> torch.Tensor:
            return kdloss.unpack(x, cu_seqlens=where.cu_seqlens, length=batch.input_ids.shape[1])  # noqa: B023

        padded = kdloss.check_batch(*map(rows, tensors), **{name: rows(x) for name, x in given.items()}, **of_sequences)
        assert padded.ok, padded
        late = kdloss.to_token_positions(stream.teacher_logp, cu_seqlens=where.cu_seqlens, fill=0.0)
        report = kdloss.check_batch(logp, stream.old_logp, late, **given, cu_seqlens=where.cu_seqlens)
        assert [found.check for found in report.findings if found.verdict == "wrong"] == ["teacher alignment"], steps
        update(student, optimizer, batch, loss_kwargs=KDRL, max_weight=2.0)
    assert (logp - stream.old_logp)[where.loss_mask].abs().mean() > 0.03  # stale indeed
