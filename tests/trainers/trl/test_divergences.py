"""Tests the divergences that replace TRL's: equal in value and gradient where TRL is right, right where it is not."""

from __future__ import annotations

import copy
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer

from kdloss.integrations import trl as adapter

sys.path.insert(0, str(Path(__file__).parent))
import tiny

THEIR_JSD = GKDTrainer.generalized_jsd_loss
THEIR_CHUNKED = distillation_trainer._chunked_divergence_loss
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
B, L, V = 3, 5, 13


@pytest.fixture
def untouched(monkeypatch):
    """Restores after each test what `install_*` replaces."""
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(THEIR_JSD))
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", THEIR_CHUNKED)


def with_gradients(function, *inputs, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves, **options)
    loss = value[0] if isinstance(value, tuple) else value
    loss.backward()
    return value, [x.grad for x in leaves]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"reduction": "sum"},
        {"temperature": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("beta", BETAS)
def test_gkd(beta, options, labels):
    torch.manual_seed(0)
    logits, teacher_logits = 3 * torch.randn(2, B, L, V, dtype=torch.float64)
    masked = torch.where(torch.rand(B, L) < 0.4, -100, 1)
    options = {**options, "beta": beta, "labels": masked if labels else None, "teacher_logits": teacher_logits}
    theirs, their_gradients = with_gradients(THEIR_JSD, logits, **options)
    ours, our_gradients = with_gradients(adapter.generalized_jsd_loss, logits, **options)
    assert_close(ours, theirs)
    assert_close(our_gradients, their_gradients)


@pytest.mark.parametrize("beta", BETAS)
def test_gkd_in_half_precision_is_right_where_trl_rounds(beta):
    torch.manual_seed(0)
    logits, teacher_logits = (3 * torch.randn(2, B, L, 4096)).bfloat16()
    exact = adapter.generalized_jsd_loss(logits.double(), teacher_logits.double(), beta=beta)
    theirs = THEIR_JSD(logits, teacher_logits, beta=beta).double()
    ours = adapter.generalized_jsd_loss(logits, teacher_logits, beta=beta).double()
    assert (ours / exact - 1).abs() < 1e-6  # float32 throughout; the bf16 logits are exact inputs
    assert (theirs / exact - 1).abs() > 1e-4


@pytest.mark.parametrize("beta", BETAS)
def test_gkd_with_tokens_that_both_exclude(beta):
    """A token with logit -inf on both sides has no mass, so its term is 0 log 0 = 0; TRL's value is NaN."""
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, B, L, V, dtype=torch.float64)
    without = with_gradients(adapter.generalized_jsd_loss, logits, teacher_logits=teacher_logits, beta=beta)
    excluded = torch.full((B, L, 1), -torch.inf, dtype=torch.float64)
    wide = [torch.cat([x, excluded], -1) for x in (logits, teacher_logits)]
    value, (gradient,) = with_gradients(adapter.generalized_jsd_loss, wide[0], teacher_logits=wide[1], beta=beta)
    assert_close(value, without[0])
    assert_close(gradient, torch.cat([without[1][0], torch.zeros_like(excluded)], -1))
    assert THEIR_JSD(*wide, beta=beta).isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gkd_reductions_that_are_not_per_token_are_refused(reduction):
    with pytest.raises(ValueError, match='reduction must be "batchmean" or "sum"'):
        adapter.generalized_jsd_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), reduction=reduction)


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)], ids=str)
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"scales": True}], ids=["plain", "bias", "softcap"])
@pytest.mark.parametrize("beta", BETAS)
def test_distillation_trainer(beta, extras, num_items):
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, L, 8), torch.randn(V, 8)
    teacher_hidden, teacher_weight = torch.randn(B, L, 12), torch.randn(V, 12)
    mask = (torch.rand(B, L) < 0.6).long()
    bias, teacher_bias = torch.randn(2, V) if extras.get("bias") else (None, None)
    options = {"completion_mask": mask, "beta": beta, "num_items_in_batch": num_items, "temperature": 0.8}
    if extras.get("scales"):
        options |= {
            "student_logit_scale": 0.5,
            "teacher_logit_scale": 1.5,
            "student_final_logit_softcapping": 4.0,
            "teacher_final_logit_softcapping": 6.0,
        }

    def call(function):
        def loss(hidden, weight, *bias):
            student_bias = {"student_lm_head_bias": bias[0], "teacher_lm_head_bias": teacher_bias} if bias else {}
            return function(hidden, teacher_hidden, weight, teacher_weight, **options, **student_bias)

        return with_gradients(loss, hidden, weight, *([] if bias is None else [bias]))

    (loss, entropy, tokens), gradients = call(adapter.chunked_divergence_loss)
    (their_loss, their_entropy, their_tokens), their_gradients = call(THEIR_CHUNKED)
    assert tokens == their_tokens == mask.sum()
    # float32 on both sides, summed in different orders
    assert_close(loss, their_loss, atol=1e-6, rtol=1e-5)
    assert_close(entropy, their_entropy, atol=1e-5, rtol=1e-5)
    assert_close(gradients, their_gradients, atol=1e-6, rtol=1e-4)
    assert not entropy.requires_grad


def test_distillation_trainer_with_nothing_trained():
    hidden = torch.randn(B, L, 8, requires_grad=True)
    loss, entropy, tokens = adapter.chunked_divergence_loss(
        hidden, hidden.detach(), torch.randn(V, 8), torch.randn(V, 8), torch.zeros(B, L), 0.5
    )
    loss.backward()
    assert (loss, entropy, tokens) == (0, 0, 0)
    assert not hidden.grad.any()


def distil(tmp_path, teacher, **options):
    arguments = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **options,
    }
    trainer = DistillationTrainer(
        model=tiny.model(seed=1),
        teacher_model=copy.deepcopy(teacher),
        args=DistillationConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "entropy" in row]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_run_of_distillation_trainer_is_the_same(tmp_path, untouched, beta):
    teacher = tiny.alphabetical_teacher(steps=60)
    theirs = distil(tmp_path / "theirs", teacher, beta=beta)
    adapter.install_distillation()
    assert distillation_trainer._chunked_divergence_loss is adapter.chunked_divergence_loss
    ours = distil(tmp_path / "ours", teacher, beta=beta)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        # four steps of Adam differ by float32 rounding at most
        for name in ("loss", "entropy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), name


def test_a_run_of_distillation_trainer_improves(tmp_path, untouched):
    adapter.install_distillation()
    logs = distil(
        tmp_path, tiny.alphabetical_teacher(), beta=1.0, max_steps=25, learning_rate=3e-3, gradient_accumulation_steps=1
    )
    assert logs[-1]["loss"] < 0.3 * logs[0]["loss"]


def test_a_step_of_gkd_is_the_same(tmp_path, untouched):
    teacher = tiny.alphabetical_teacher(steps=30)

    def losses(name):
        arguments = GKDConfig(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=4,
            max_steps=2,
            logging_steps=1,
            max_new_tokens=6,
            max_length=32,
            lmbda=0.5,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        chats = [
            [{"role": "user", "content": tiny.LETTERS[i % 7]}, {"role": "assistant", "content": "abc"[: 1 + i % 3]}]
            for i in range(8)
        ]
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
        )
        trainer = GKDTrainer(
            model=tiny.model(seed=1),
            teacher_model=copy.deepcopy(teacher),
            args=arguments,
            train_dataset=Dataset.from_dict({"messages": chats}),
            processing_class=tokenizer,
        )
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    theirs = losses("theirs")
    adapter.install_gkd()
    assert GKDTrainer.generalized_jsd_loss is adapter.generalized_jsd_loss
    assert losses("ours") == pytest.approx(theirs, rel=1e-3)
    assert all(x > 0 for x in theirs)


def test_another_version_with_all_hooks_is_used_with_a_warning(monkeypatch, untouched):
    """What the adapter looks for in a version that it was not tested with is what the tested one has."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "99.0")
    with pytest.warns(UserWarning, match=r"was tested with trl>=1\.16,<1\.17, and 99\.0 is installed"):
        adapter.install_distillation()
    adapter.install_gkd()
    for module in adapter._HOOKS:
        assert adapter._trl(module).__name__ == module
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(lambda logits, labels: None))
    with pytest.raises(
        ImportError, match=r"needs GKDTrainer\.generalized_jsd_loss\(student_logits, .*tested with trl>="
    ):
        adapter.install_gkd()
