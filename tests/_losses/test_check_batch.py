"""Tests check_batch: sound batches are ok in every layout, and each mistake is found, named and mended as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdloss

V, ROWS, LENGTH, PROMPT = 40, 16, 30, 5


def rollout(seed: int = 0, *, drift: float = 0.0, likeness: float = 0.9, length: int = LENGTH) -> dict[str, Any]:
    """A packed batch of a Markov chain's samples, with a teacher that is like it, and the policy that sampled."""
    generator = torch.Generator().manual_seed(seed)
    behaviour, other, noise = 2 * torch.randn(3, V, V, generator=generator)
    student = behaviour + drift / 2 * noise
    teacher = likeness * behaviour + (1 - likeness**2) ** 0.5 * other
    tokens = [torch.zeros(ROWS, dtype=torch.int64)]
    for _ in range(length - 1):
        tokens.append(behaviour[tokens[-1]].softmax(-1).multinomial(1, generator=generator)[:, 0])
    ids = torch.stack(tokens, 1).flatten()
    cu_seqlens = torch.arange(0, ROWS * length + 1, length)
    labels = kdloss.next_token_labels(ids, cu_seqlens=cu_seqlens)
    mask = kdloss.response_mask(torch.full((ROWS,), PROMPT), cu_seqlens=cu_seqlens, total_tokens=len(ids))
    logp, old_logp, teacher_logp = (kdloss.token_logprobs(x[ids], labels) for x in (student, behaviour, teacher))
    rewards = torch.randint(2, (ROWS,), generator=generator).float()
    rewards[0] = 1 - rewards[1]
    advantages = kdloss.group_relative_advantages(rewards, group_size=4)
    return {
        "logp": logp,
        "old_logp": old_logp,
        "teacher_logp": teacher_logp,
        "loss_mask": mask,
        "labels": labels,
        "input_ids": ids,
        "advantages": kdloss.broadcast_to_tokens(advantages, cu_seqlens=cu_seqlens, total_tokens=len(ids)),
        "rewards": rewards,
        "group_size": 4,
        "cu_seqlens": cu_seqlens,
    }


def check(batch: dict[str, Any], **changes: Any) -> kdloss.BatchReport:
    arguments = batch | changes
    tensors = [arguments.pop(name) for name in ("logp", "old_logp", "teacher_logp")]
    return kdloss.check_batch(*tensors, **arguments)


def wrong(report: kdloss.BatchReport) -> dict[str, str]:
    assert report.ok == all(finding.verdict in ("ok", "not given") for finding in report.findings)
    return {finding.check: finding.text for finding in report.findings if finding.verdict == "wrong"}


@pytest.mark.parametrize("drift", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_sound_batches_are_ok(seed, drift):
    """On-policy and stale, packed and padded, with the end of a group and without what is optional."""
    batch = rollout(seed, drift=drift)
    report = check(batch)
    assert report.ok, report
    assert {finding.verdict for finding in report.findings} == {"ok"}
    padded = {name: x.view(ROWS, LENGTH) if x.shape == batch["logp"].shape else x for name, x in tensors_of(batch)}
    assert check(padded, group_size=4, cu_seqlens=None) == report
    assert check(batch, group_size=None, group_ids=torch.arange(ROWS) // 4) == report
    for left_out in ("old_logp", "teacher_logp", "labels", "advantages", "rewards", "group_size"):
        report = check(batch, **{left_out: None})
        assert report.ok, report
        assert "not given" in str(report)
    bf16 = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors_of(batch)}
    assert check(bf16, group_size=4).ok


def tensors_of(batch: dict[str, Any]):
    return ((name, x) for name, x in batch.items() if isinstance(x, torch.Tensor))


def test_what_cannot_be_told_is_said():
    batch = rollout()
    report = check(batch, old_logp=None, labels=None)
    assert report.ok
    lines = {finding.check: finding for finding in report.findings}
    assert lines["old_logp"].verdict == lines["loss_mask"].verdict == "not given"
    assert "cannot be told whether the tokens are on-policy" in str(report)
    few = batch["loss_mask"] & (torch.arange(ROWS * LENGTH) < 25)
    report = check(batch, loss_mask=few, rewards=None)
    assert not report.ok
    assert wrong(report) == {}
    assert "cannot tell  teacher alignment  21 trained tokens are too few" in str(report)


# What a user does wrong: the check that finds it, and a part of what it says.
MISTAKES = {
    "late teacher": (lambda b: {"teacher_logp": b["teacher_logp"].roll(1)}, "teacher alignment", "to_prediction_pos"),
    "early teacher": (lambda b: {"teacher_logp": b["teacher_logp"].roll(-1)}, "teacher alignment", "drops a first"),
    "late old": (lambda b: {"old_logp": b["old_logp"].roll(1)}, "old alignment", "old_logp[t +1] belongs to logp[t]"),
    "early old": (lambda b: {"old_logp": b["old_logp"].roll(-1)}, "old alignment", "old_logp[t -1] belongs to"),
    "swapped": (
        lambda b: {"old_logp": b["teacher_logp"], "teacher_logp": b["old_logp"]},
        "ratio",
        "are the two swapped?",
    ),
    "other weights": (lambda b: {"old_logp": 2 * b["old_logp"]}, "ratio", "is far from 1"),
    "probabilities": (lambda b: {"logp": b["logp"].exp()}, "logp", "these are probabilities; pass logp.log()"),
    "a loss": (lambda b: {"logp": -b["logp"]}, "logp", "these are negated log-probs; pass -logp"),
    "teacher's probabilities": (lambda b: {"teacher_logp": b["teacher_logp"].exp()}, "teacher_logp", "probabilities"),
    "logits": (lambda b: {"old_logp": b["old_logp"] + 2}, "old_logp", "these are not log-probs"),
    "NaN": (lambda b: {"teacher_logp": torch.where(some(b), torch.nan, b["teacher_logp"])}, "teacher_logp", "NaN at"),
    "excluded by itself": (lambda b: {"logp": torch.where(some(b), -torch.inf, b["logp"])}, "logp", "-inf at"),
    "zeros": (lambda b: {"teacher_logp": 0 * b["teacher_logp"]}, "teacher alignment", "at every trained token"),
    "nothing scored": (lambda b: {"teacher_logp": torch.full_like(b["logp"], -9999)}, "teacher_logp", "-9999 at every"),
    "sentinels": (
        lambda b: {"teacher_logp": torch.where(some(b), -9999, b["teacher_logp"])},
        "teacher_logp",
        "-inf or -9999",
    ),
    "holes": (
        lambda b: {"teacher_logp": torch.where(torch.arange(480) % 2 == 0, 0, b["teacher_logp"])},
        "teacher_logp",
        "were missing scores filled with 0",
    ),
    "other tokenizer": (
        lambda b: {"teacher_logp": -12 + torch.randn(480, generator=torch.Generator().manual_seed(0))},
        "distance",
        "Does it have another tokenizer",
    ),
    "the teacher's text": (
        lambda b: {"logp": b["teacher_logp"], "teacher_logp": b["logp"], "old_logp": None},
        "distance",
        "written by the teacher",
    ),
    "mask at own positions": (
        lambda b: {"loss_mask": b["loss_mask"].roll(1)},
        "loss_mask",
        "16 of them have label -100",
    ),
    "mask at own positions, without labels": (
        lambda b: {"loss_mask": b["loss_mask"].roll(1), "labels": None},
        "loss_mask",
        "16 of them end a sequence, where nothing has a score",
    ),
    "labels not shifted": (
        lambda b: {"labels": torch.where(b["labels"] == -100, -100, b["input_ids"])},
        "labels",
        "each is the token of its own position: make them with kdloss.next_token_labels",
    ),
    "labels of another batch": (
        lambda b: {"labels": torch.where(b["labels"] == -100, -100, b["labels"].roll(LENGTH))},
        "labels",
        "are not the token after their position",
    ),
    "no token": (lambda b: {"loss_mask": b["loss_mask"] & False}, "loss_mask", "nothing is learned"),
    "a discount far from the teacher": (
        lambda b: {"kd_discount": 1.0, "teacher_logp": b["teacher_logp"] - 0.6 * b["loss_mask"]},
        "kd_discount",
        "Take kd_discount=0 until",
    ),
    "advantages per sequence": (lambda b: {"advantages": b["rewards"]}, "advantages", "kdloss.broadcast_to_tokens"),
    "advantages of another shape": (lambda b: {"advantages": b["logp"][1:]}, "advantages", "is not that of logp"),
    "advantages 0": (lambda b: {"advantages": 0 * b["advantages"]}, "advantages", "0 at every trained token"),
    "advantages NaN": (lambda b: {"advantages": b["advantages"] / 0}, "advantages", "NaN or infinite"),
    "equal rewards": (lambda b: {"rewards": torch.ones(ROWS)}, "rewards", "every group-relative advantage is 0"),
    "rewards NaN": (lambda b: {"rewards": b["rewards"] * torch.nan}, "rewards", "16 are NaN or infinite"),
    "rewards per token": (lambda b: {"rewards": b["advantages"]}, "rewards", "is not one per sequence, (16,)"),
    "groups of one": (lambda b: {"group_size": 1}, "rewards", "group-relative advantage is always 0: 16"),
    "group size": (lambda b: {"group_size": 3}, "rewards", "not a multiple of group_size 3"),
    "group ids": (
        lambda b: {"group_size": None, "group_ids": torch.arange(4)},
        "rewards",
        "group_ids of shape (4,) are not one per sequence",
    ),
    "an empty group": (
        lambda b: {"loss_mask": b["loss_mask"] & (torch.arange(480) >= 4 * LENGTH)},
        "rewards",
        "groups without a trained token: 1",
    ),
}


def some(batch: dict[str, Any]) -> torch.Tensor:
    return batch["loss_mask"] & (torch.arange(ROWS * LENGTH) % 50 == 7)


@pytest.mark.parametrize(("mistake", "where", "said"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_is_found(mistake, where, said):
    for seed in range(3):
        batch = rollout(seed)
        report = check(batch, **mistake(batch))
        assert not report.ok
        assert said in wrong(report).get(where, ""), report
        assert f"  WRONG        {where}" in str(report)


def test_the_ways_out_lead_to_a_sound_batch():
    batch = rollout()
    labels, mask, logp = batch["labels"], batch["loss_mask"], batch["logp"]
    late = mask.roll(1)
    assert check(batch, loss_mask=late & (labels != -100), rewards=None).findings[0].verdict == "ok"
    assert check(batch, logp=logp.exp().log(), teacher_logp=-batch["teacher_logp"].neg()).ok
    missing = torch.where(some(batch), torch.nan, batch["teacher_logp"])
    assert check(batch, teacher_logp=missing, loss_mask=mask & ~missing.isnan()).ok
    kd_mask = ~some(batch)
    assert "pass loss_mask & kd_mask here" in wrong(check(batch, teacher_logp=missing))["teacher_logp"]
    assert check(batch, teacher_logp=missing, loss_mask=mask & kd_mask).ok
    scored = torch.where(some(batch), -9999, batch["teacher_logp"])
    assert check(batch, teacher_logp=scored, loss_mask=mask & (scored > -9999)).ok
    clip = 5.0
    assert "pass teacher_logp.maximum(logp - clip)" in wrong(check(batch, teacher_logp=scored))["teacher_logp"]
    assert check(batch, teacher_logp=scored.maximum(logp - clip)).ok
    per_sequence = kdloss.group_relative_advantages(batch["rewards"], group_size=4)
    spread = kdloss.broadcast_to_tokens(per_sequence, cu_seqlens=batch["cu_seqlens"], total_tokens=len(logp))
    assert check(batch, advantages=spread).ok
    rows = {name: x.view(ROWS, LENGTH) if x.shape == logp.shape else x for name, x in tensors_of(batch)}
    rows |= {"group_size": 4, "cu_seqlens": None}
    assert "pass advantages.reshape(-1, 1).expand_as(logp)" in wrong(check(rows, advantages=per_sequence))["advantages"]
    assert check(rows, advantages=per_sequence.reshape(-1, 1).expand_as(rows["logp"])).ok
    own = kdloss.to_token_positions(batch["teacher_logp"], cu_seqlens=batch["cu_seqlens"], fill=0.0)
    back = kdloss.to_prediction_positions(own, cu_seqlens=batch["cu_seqlens"], fill=torch.nan)
    assert check(batch, teacher_logp=back).ok
    far = {"teacher_logp": batch["teacher_logp"] - 0.6 * mask}
    assert "Take kd_discount=0 until" in wrong(check(batch, kd_discount=1.0, **far))["kd_discount"]
    assert check(batch, kd_discount=0, **far).ok
    report = check(batch, cu_seqlens=None)
    assert "pass cu_seqlens for a packed stream" in wrong(report)["rewards"]


def test_a_student_that_is_its_own_teacher_is_ok():
    """At the start of self-distillation the teacher is the student, in a batch of any size."""
    batch = rollout()
    few = batch["loss_mask"] & (torch.arange(ROWS * LENGTH) < 20)
    report = check(batch, teacher_logp=batch["logp"], loss_mask=few, rewards=None)
    assert report.ok, report


def test_untrained_tokens_are_not_read_and_nothing_is_changed():
    batch = rollout()
    report = check(batch)
    mask = batch["loss_mask"]
    garbage = torch.full_like(batch["logp"], torch.nan)
    names = ("logp", "old_logp", "teacher_logp", "advantages")
    spoiled = {name: torch.where(mask, batch[name], garbage).requires_grad_() for name in names}
    assert check(batch, **spoiled) == report
    assert check({name: x.clone() for name, x in tensors_of(batch)}, group_size=4) == report
    assert all(x.grad is None for x in spoiled.values())


@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_the_cost_of_a_response_under_a_discount(discount):
    """Of whole responses, whatever is masked between their tokens, packed and padded."""
    batch = rollout()
    mask = batch["loss_mask"] & (torch.arange(ROWS * LENGTH) % 7 != 3)
    gap = (batch["logp"] - batch["teacher_logp"]).view(ROWS, LENGTH)
    sums = [
        sum(discount**i * x for i, x in enumerate(row[kept]))
        for row, kept in zip(gap, mask.view(ROWS, -1), strict=True)
    ]
    expected = f"{torch.stack(sums).double().mean().item():.1f}"
    packed = check(batch, loss_mask=mask, kd_discount=discount, rewards=None)
    (found,) = (finding for finding in packed.findings if finding.check == "kd_discount")
    assert found.verdict == "ok", found
    assert f"a response is {expected} ±" in found.text
    padded = {name: x.view(ROWS, LENGTH) if x.shape == mask.shape else x for name, x in tensors_of(batch)}
    changes = {"loss_mask": mask.view(ROWS, LENGTH), "cu_seqlens": None, "kd_discount": discount, "rewards": None}
    assert check(padded, **changes) == packed
    for without in ({"teacher_logp": None}, {"teacher_logp": torch.where(mask, -9999.0, 0)}):
        verdicts = {f.check: f.verdict for f in check(batch, loss_mask=mask, kd_discount=discount, **without).findings}
        assert verdicts["kd_discount"] == ("not given" if without["teacher_logp"] is None else "cannot tell")
    assert all(finding.check != "kd_discount" for finding in check(batch, teacher_logp=None).findings)


def test_an_empty_batch():
    empty = torch.zeros(0)
    report = kdloss.check_batch(empty, empty, empty, loss_mask=empty.bool(), cu_seqlens=torch.tensor([0]))
    assert "0 of 0 tokens are trained, in 0 of 0 sequences: nothing is learned" in wrong(report)["loss_mask"]


def test_bad_arguments():
    batch = rollout()
    with pytest.raises(TypeError, match="loss_mask must be torch"):
        check(batch, loss_mask=batch["loss_mask"].long())
    with pytest.raises(ValueError, match="teacher_logp must"):
        check(batch, teacher_logp=batch["teacher_logp"][1:])
    with pytest.raises(TypeError, match="labels must be int32 or int64"):
        check(batch, labels=batch["labels"].float())
    with pytest.raises(ValueError, match="labels must"):
        check(batch, labels=batch["labels"][1:])
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        check(batch, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="group_size and group_ids exclude each other"):
        check(batch, group_ids=torch.arange(ROWS))
    with pytest.raises(ValueError, match="group_size must be > 0"):
        check(batch, group_size=0)
    with pytest.raises(TypeError, match=r"group_size must be an int, got float 4\.0"):
        check(batch, group_size=4.0)
    with pytest.raises(ValueError, match="kd_discount must be in"):
        check(batch, kd_discount=1.5)


def test_what_is_said_of_labels_and_prompts():
    batch = rollout()
    lines = {finding.check: finding for finding in check(batch).findings}
    assert lines["labels"] == ("labels", "ok", "each is the token after its position")
    assert "no prompt" not in lines["loss_mask"].text
    everything = check(batch, loss_mask=batch["labels"] != -100)
    assert everything.findings[0].text.endswith("all but one of each sequence, so no prompt is left out")
    # prompts without a label are left out
    unlabelled = batch["labels"].masked_fill(~batch["loss_mask"], -100)
    assert "no prompt" not in check(batch, labels=unlabelled).findings[0].text
    nothing = torch.zeros(0)
    empty = {"loss_mask": nothing.bool(), "labels": nothing.long(), "input_ids": nothing.long()}
    report = kdloss.check_batch(nothing, **empty, cu_seqlens=torch.tensor([0, 0]))
    assert [x.verdict for x in report.findings if x.check == "labels"] == ["cannot tell"]
    assert "labels" not in {finding.check for finding in check(batch, input_ids=None).findings}
    assert [x.verdict for x in check(batch, labels=None).findings if x.check == "labels"] == ["not given"]
    ends = batch["cu_seqlens"][1:] - 1
    last = torch.zeros(ROWS * LENGTH, dtype=torch.bool).index_fill(0, ends, True)
    report = check(batch, loss_mask=last, labels=batch["labels"].masked_fill(last, 1), rewards=None)
    assert [x.verdict for x in report.findings if x.check == "labels"] == ["cannot tell"]


def test_a_group_of_equal_rewards_is_told_from_lost_advantages_by_its_rewards():
    """A micro-batch is often one group. Without its rewards, advantages of 0 are no mistake that can be seen."""
    batch = rollout()
    batch["advantages"] = 0 * batch["advantages"]
    for left_out in ("rewards", "group_size"):
        report = check(batch, **{left_out: None})
        assert not report.ok
        assert report.wrong == ()
        assert any("Pass rewards= and group_size=" in finding.text for finding in report.findings)
    assert [finding.check for finding in check(batch).wrong] == ["advantages"]
    assert [finding.check for finding in check(batch, rewards=1 + 0 * batch["rewards"]).wrong] == [
        "advantages",
        "rewards",
    ]


def test_rewards_that_differ_by_rounding_are_equal_as_for_the_advantages():
    batch = rollout()
    rewards = torch.full((ROWS,), 10.0)
    rewards[3] = torch.nextafter(rewards[3], torch.tensor(11.0))
    assert "every group-relative advantage is 0" in wrong(check(batch, rewards=rewards))["rewards"]


def test_a_few_tokens_are_no_evidence_against_a_sharper_teacher():
    sharper = torch.full((10,), -0.01)
    report = kdloss.check_batch(torch.full((10,), -0.22), None, sharper, loss_mask=torch.ones(10).bool())
    assert wrong(report) == {}


def test_a_minority_of_late_or_unscored_sequences_is_found():
    long = rollout(length=100)
    rows = long["teacher_logp"].view(ROWS, -1)
    for wrong_rows in ([3], [0, 7]):
        late, unscored = rows.clone(), rows.clone()
        late[wrong_rows] = late[wrong_rows].roll(1, -1)
        unscored[wrong_rows] = 0.0
        said = wrong(check(long, teacher_logp=late.flatten()))["teacher alignment"]
        assert f"shifted sequences: {len(wrong_rows)}, such as {wrong_rows[0]}, where teacher_logp[t +1]" in said
        said = wrong(check(long, teacher_logp=unscored.flatten()))["teacher_logp"]
        assert f"every trained token of {len(wrong_rows)} sequences, such as sequence {wrong_rows[0]}" in said


def test_a_teacher_that_is_nearly_the_student_is_not_taken_for_the_policy_that_sampled():
    """Where old_logp is stale or of a top-p sampler, and the teacher is the student."""
    batch = rollout(drift=0.6)
    report = check(batch, teacher_logp=batch["logp"])
    assert (batch["logp"] - batch["old_logp"])[batch["loss_mask"]].abs().mean() > 0.1
    assert report.ok, report
    spread = batch["logp"] - 0.2
    top_p = spread + 0.1  # renormalised over the nucleus
    assert check(batch, logp=spread, old_logp=top_p, teacher_logp=spread).ok
    few = batch["loss_mask"] & (torch.arange(ROWS * LENGTH) < 30)
    noise = 0.1 * torch.randn(ROWS * LENGTH, generator=torch.Generator().manual_seed(1))
    old_logp = torch.where(noise > 0, batch["logp"] - 0.1, batch["logp"] + 0.1).clamp(max=0)
    report = check(batch, old_logp=old_logp, teacher_logp=batch["logp"], loss_mask=few, rewards=None)
    assert {finding.check: finding.verdict for finding in report.findings}["ratio"] == "cannot tell", report
    assert check(rollout(), teacher_logp=rollout()["logp"]).ok  # with all of the tokens


def test_a_certain_end_of_sequence_is_not_taken_for_an_ignored_label():
    batch = rollout()
    last = torch.arange(ROWS * LENGTH) % LENGTH == LENGTH - 1
    own_end = {
        "loss_mask": batch["loss_mask"] | last,
        "logp": torch.where(last, 0.0, batch["logp"]),
        "old_logp": torch.where(last, 0.0, batch["old_logp"]),
        "teacher_logp": torch.where(last, -0.01, batch["teacher_logp"]),
    }
    assert check(batch, **own_end, labels=None).ok
    for name in ("old_logp", "teacher_logp"):
        own_end[name] = None
    report = check(batch, **own_end, labels=None)
    assert report.findings[0].verdict == "not given"
    assert "pass labels=" in report.findings[0].text
