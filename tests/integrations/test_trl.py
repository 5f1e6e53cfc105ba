"""Tests the TRL adapter against TRL 1.16 without TRL: inputs, denominators, metrics, errors; oracles give the values.

`tests/trainers/trl` tests the same inside TRL.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kdloss.integrations import trl as adapter
from kdloss.testing import reference

B, L, V = 4, 6, 11
LOSS_TYPES = ("grpo", "sapo", "bnpo", "dr_grpo", "cispo", "dapo", "vespo", "luspo")


class StandIn:
    """The part of a GRPOTrainer that the adapter uses; the policy is a table of log-probs, and the loss scores it."""

    def __init__(self, model, *, loss_type="bnpo", steps=2, processes=3):
        self.model, self.loss_type = model, loss_type
        self.args = SimpleNamespace(steps_per_generation=4, per_device_train_batch_size=4, per_device_eval_batch_size=4)
        self.current_gradient_accumulation_steps, self.max_completion_length = steps, 9
        self.accelerator = SimpleNamespace(num_processes=processes, reduce=lambda x, reduction: processes * x)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model, *_, **__):
        return model.table * 1, None, None

    def _compute_loss(self, model, inputs):
        logp, _, _ = self._get_per_token_logps_and_entropies(model)
        return (logp * inputs["completion_mask"]).sum() / 7

    def _generate_and_score_completions(self, inputs):
        return inputs


class KDRL(adapter.KDRLMixin, StandIn):
    def teacher_logps(self, inputs):
        return inputs.get("teacher")


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(-2 + torch.randn(B, L, dtype=torch.float64))


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(adapter, "require", lambda package, **_: None)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    lengths = torch.tensor([6, 0, 3, 4])
    return {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(B, L, dtype=torch.int64),
        "completion_mask": (torch.arange(L) < lengths[:, None]).long(),
        "tool_mask": (torch.rand(B, L) < 0.8).long(),
        "num_items_in_batch": torch.tensor(90),
        "old_per_token_logps": -2 + torch.randn(B, L, dtype=torch.float64),
        "teacher": -2 + torch.randn(B, L, dtype=torch.float64),
    }


def denominator(trainer, inputs, mask, training):
    """(reduction, normalizer) of each loss type, as TRL documents it."""
    steps, loss_type = (2 if training else 1), trainer.loss_type
    if loss_type in ("grpo", "sapo"):
        return "sequence_mean", B * steps
    if loss_type == "bnpo":
        return "token_mean", mask.sum() * steps
    if loss_type == "dr_grpo":
        return "token_mean", B * 9 * steps
    if loss_type == "luspo":
        return "token_mean", B * steps
    return "token_mean", 90 / 3 * (2 / 4 if training else 1)


@pytest.mark.parametrize("options", [{}, {"kd_discount": 0.5}, {"kd_reward_clip": 0.8, "kd_max_ratio": 1.1}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_is_trls_plus_the_term_over_its_denominator(inputs, loss_type, training, options):
    torch.manual_seed(1)
    trainer = KDRL(Policy(), loss_type=loss_type, distill_loss_weight=0.3, rl_loss_weight=0.5, **options)
    trainer.model.train(training)
    batch = trainer._generate_and_score_completions(inputs)
    assert batch["teacher_per_token_logps"] is inputs["teacher"]
    trainer._compute_loss(trainer.model, batch).backward()
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool().flatten().numpy()
    reduction, normalizer = denominator(trainer, inputs, mask, training)
    table = trainer.model.table.detach().flatten().numpy()
    arguments = (table, inputs["old_per_token_logps"].flatten().numpy(), inputs["teacher"].flatten().numpy())
    options = {**options, "cu_seqlens": np.arange(0, B * L + 1, L), "reduction": reduction, "normalizer": normalizer}
    expected = 0.3 * reference.distillation_loss_grad(*arguments, loss_mask=mask, **options)
    theirs = 0.5 * inputs["completion_mask"].flatten() / 7
    assert_close(trainer.model.table.grad.flatten(), theirs + torch.from_numpy(expected))
    trainer.model.zero_grad()
    value = trainer._compute_loss(trainer.model, batch)
    of_trl = 0.5 * (trainer.model.table * inputs["completion_mask"]).sum() / 7
    term = reference.distillation_loss(*arguments, loss_mask=mask, **options).loss
    assert_close(value, of_trl + 0.3 * torch.as_tensor(float(term), dtype=torch.float64))


@pytest.mark.parametrize("updated", [True, False])
def test_the_ratio_is_against_vllms_log_probs_where_it_has_them(inputs, updated):
    """Where vLLM has no log-prob (NaN), the ratio is against TRL's old log-probs, or 1 in the first update."""
    trainer = KDRL(Policy(), distill_loss_weight=1.0, rl_loss_weight=0.0)
    table = trainer.model.table.detach()
    sampled = torch.where(torch.rand(B, L) < 0.3, torch.nan, table - 0.4)
    old = inputs.pop("old_per_token_logps")
    if updated:
        inputs["old_per_token_logps"] = old
    batch = trainer._generate_and_score_completions(inputs | {"sampling_per_token_logps": sampled})
    trainer._compute_loss(trainer.model, batch).backward()
    behaviour = torch.where(sampled.isnan(), old if updated else table, sampled)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    arguments = (x.flatten().numpy() for x in (table, behaviour, inputs["teacher"]))
    expected = reference.distillation_loss_grad(
        *arguments, loss_mask=mask.flatten().numpy(), normalizer=float(mask.sum() * 2)
    )
    assert_close(trainer.model.table.grad.flatten(), torch.from_numpy(expected))


def test_what_is_logged(inputs):
    trainer = KDRL(Policy(), distill_loss_weight=0.0)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    for place, excluded in ((3, -torch.inf), (1, -9999.0)):  # a server's -inf
        row, column = mask.nonzero()[place].tolist()
        inputs["teacher"][row, column] = excluded
    batch = trainer._generate_and_score_completions(inputs)
    trainer.model.eval()
    trainer._compute_loss(trainer.model, batch)
    inputs["teacher"] = torch.where(mask, -1.0, torch.nan)
    batch = trainer._generate_and_score_completions(inputs)
    trainer.model.train()
    trainer._compute_loss(trainer.model, batch)
    assert trainer._metrics["eval"]["distill/teacher_neg_inf"] == [6.0]  # two per rank, on three ranks
    assert trainer._metrics["train"]["distill/teacher_neg_inf"] == [0.0]
    expected = (trainer.model.table.detach() + 1)[mask].mean().item()
    assert trainer._metrics["train"]["distill/reverse_kl"] == [pytest.approx(expected, rel=1e-6)]


def test_a_weight_of_0_leaves_nothing_of_its_term(inputs):
    trainer = KDRL(Policy(), distill_loss_weight=1.0, rl_loss_weight=0.0)
    batch = trainer._generate_and_score_completions(inputs)
    with torch.no_grad():
        alone = trainer._compute_loss(trainer.model, batch)
    trainer_loss = StandIn._compute_loss
    try:
        StandIn._compute_loss = lambda self, *x: trainer_loss(self, *x) * torch.nan
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
    finally:
        StandIn._compute_loss = trainer_loss
    assert loss == alone
    assert trainer.model.table.grad.isfinite().all()
    trainer.rl_loss_weight, trainer.distill_loss_weight = 1.0, 0.0
    batch["teacher_per_token_logps"] = torch.full((B, L), torch.nan)
    assert_close(trainer._compute_loss(trainer.model, batch), trainer_loss(trainer, trainer.model, batch))


def test_what_cannot_work_is_refused(inputs):
    class NoTeacher(adapter.KDRLMixin, StandIn):
        pass

    with pytest.raises(ValueError, match=r"teacher_model must be given where distill_loss_weight is 0.005"):
        NoTeacher(Policy(), distill_loss_weight=0.005)
    with pytest.raises(ValueError, match=r"args.loss_type must be one of .*, got 'new'"):
        KDRL(Policy(), distill_loss_weight=0.005, loss_type="new")
    with pytest.raises(ValueError, match=r"kd_discount must be in 0 .. 1, got 2"):
        KDRL(Policy(), distill_loss_weight=0.005, kd_discount=2.0)
    model = Policy()
    with pytest.raises(ValueError, match="teacher_model is the model that is trained"):
        NoTeacher(model, distill_loss_weight=0.005, teacher_model=model)
    shares = Policy()
    shares.table = model.table
    with pytest.raises(
        ValueError, match=r"must share no parameters .*, got 1 that it does, such as table: pass a copy"
    ):
        NoTeacher(model, distill_loss_weight=0.005, teacher_model=shares)
    assert model.table.requires_grad
    trainer = KDRL(Policy(), distill_loss_weight=0.005)
    with pytest.raises(NotImplementedError, match="images: the teacher is scored on text only"):
        trainer._generate_and_score_completions({**inputs, "pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"teacher_model must be given where distill_loss_weight is 0.005"):
        trainer._compute_loss(trainer.model, inputs)

    class Moved(KDRL):
        def _get_per_token_logps_and_entropies(self, model, *_, **__):
            return StandIn._get_per_token_logps_and_entropies(self, model)

    moved = Moved(Policy(), distill_loss_weight=0.005)
    with pytest.raises(RuntimeError, match="its hook has moved"):
        moved._compute_loss(moved.model, moved._generate_and_score_completions(inputs))


def test_without_trl_the_trainer_says_what_installs_it(monkeypatch):
    monkeypatch.undo()

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    mixin = functools.partial(adapter.KDRLMixin, distill_loss_weight=1.0)
    for ask in (lambda: adapter.KDRLTrainer, adapter.install_distillation, adapter.install_gkd, mixin):
        with pytest.raises(ImportError, match=r"needs trl, which is not installed: pip install 'trl>=1.16,<1.17'"):
            ask()


BETAS = {0.0: ("forward_kl", {}), 0.3: ("generalized_jsd", {"beta": 0.3}), 1.0: ("reverse_kl", {})}


@pytest.mark.parametrize("beta", BETAS)
def test_divergences_are_the_textbooks(beta):
    torch.manual_seed(0)
    name, options = BETAS[beta]
    mask = torch.rand(B, L) < 0.6
    weights = mask.numpy().ravel()
    logits, teacher_logits = torch.randn(2, B, L, V, dtype=torch.float64)
    per_token = getattr(reference, name)(logits.numpy(), teacher_logits.numpy(), temperature=0.7, **options).ravel()
    labels = torch.where(mask, 1, -100)
    for keywords, denominator in (({}, weights.sum()), ({"reduction": "sum"}, 1), ({"num_items_in_batch": 5}, 5)):
        ours = adapter.generalized_jsd_loss(logits, teacher_logits, labels, beta, 0.7, **keywords)
        assert ours.item() == pytest.approx((per_token * weights).sum() / denominator)
    unlabelled = adapter.generalized_jsd_loss(logits, teacher_logits, beta=beta, temperature=0.7)
    assert unlabelled.item() == pytest.approx(per_token.sum() / B)

    hidden, weight = torch.randn(B, L, 5, dtype=torch.float64), torch.randn(V, 5, dtype=torch.float64)
    other, other_weight = torch.randn(B, L, 3, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64)
    loss, entropy, tokens = adapter.chunked_divergence_loss(
        hidden, other, weight, other_weight, mask.long(), beta, torch.tensor(40.0), temperature=0.7
    )
    logits, teacher_logits = hidden @ weight.T, other @ other_weight.T
    per_token = getattr(reference, name)(logits.numpy(), teacher_logits.numpy(), temperature=0.7, **options).ravel()
    assert loss.item() == pytest.approx((per_token * weights).sum() / 40)
    p = (logits / 0.7).softmax(-1)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum(-1)[mask].sum().item())
    assert tokens == mask.sum()


def test_the_heads_of_student_and_teacher_are_not_mixed_up():
    """Bias, scale and softcap differ between student and teacher; the temperature is shared."""
    torch.manual_seed(1)
    mask = torch.rand(B, L) < 0.6
    hidden, teacher_hidden = torch.randn(2, B, L, 5, dtype=torch.float64)
    weight, teacher_weight = 2 * torch.randn(2, V, 5, dtype=torch.float64)
    bias, teacher_bias = torch.randn(2, V, dtype=torch.float64)
    loss, entropy, _ = adapter.chunked_divergence_loss(
        hidden,
        teacher_hidden,
        weight,
        teacher_weight,
        mask.long(),
        1.0,
        40,
        student_lm_head_bias=bias,
        teacher_lm_head_bias=teacher_bias,
        student_logit_scale=0.5,
        teacher_logit_scale=2.0,
        student_final_logit_softcapping=1.5,
        teacher_final_logit_softcapping=4.0,
        temperature=0.7,
    )
    logits = 1.5 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 1.5)
    teacher_logits = 4.0 * torch.tanh(2.0 * (teacher_hidden @ teacher_weight.T + teacher_bias) / 4.0)
    per_token = reference.reverse_kl(logits.numpy(), teacher_logits.numpy(), temperature=0.7)
    assert loss.item() == pytest.approx(per_token[mask.numpy()].sum() / 40)
    q = (logits / 0.7).softmax(-1)
    assert entropy.item() == pytest.approx(-(q * q.log()).sum(-1)[mask].sum().item())
