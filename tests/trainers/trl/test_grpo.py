"""Tests KDRLTrainer inside TRL: weight 0 is GRPOTrainer to the bit, the term has TRL's denominators, and it trains."""

from __future__ import annotations

import copy
import sys
from itertools import product
from pathlib import Path

import peft
import pytest
import torch
from torch.testing import assert_close
from trl import GRPOTrainer

import kdloss
from kdloss import _checks
from kdloss.integrations import trl as adapter
from kdloss.integrations.trl import KDRLMixin, KDRLTrainer
from launches import Launches

sys.path.insert(0, str(Path(__file__).parent))
import tiny

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture(scope="module")
def student():
    return tiny.model(seed=1)


@pytest.fixture(scope="module")
def teacher():
    return tiny.alphabetical_teacher()


def of_models(model, teacher, config, **keywords):
    """A KDRLTrainer of these very models, not of copies."""
    return KDRLTrainer(
        model=model,
        reward_funcs=tiny.in_order,
        args=config,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        teacher_model=teacher,
        distill_loss_weight=1.0,
        **keywords,
    )


def generated(trainer, *, off_policy=0.0, seed=0):
    """The inputs of one micro-batch of `trainer`; `off_policy` shifts the old log-probs by that much."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    torch.manual_seed(seed)
    rows = [trainer.train_dataset[i // 4] for i in range(trainer.args.generation_batch_size)]
    inputs = trainer._prepare_inputs(rows)
    rows, length = inputs["completion_mask"].shape
    lengths = 1 + torch.arange(rows) % length  # rows of every length, as if each had ended there
    inputs["completion_mask"] *= torch.arange(length) < lengths[:, None]
    if off_policy:
        logp = scored(trainer, inputs)
        inputs["old_per_token_logps"] = logp.detach() + off_policy * torch.randn(logp.shape)
    return inputs


def scored(trainer, inputs, model=None):
    """The student's log-probs of the completion, computed from transformers' logits only."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = (model or trainer.model)(input_ids=ids, attention_mask=mask).logits / trainer.temperature
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logp[:, -inputs["completion_ids"].shape[1] :]


def gradient(trainer, loss_function, inputs):
    trainer.model.zero_grad()
    loss = loss_function(trainer.model, inputs)
    loss.backward()
    gradients = torch.cat([p.grad.flatten().clone() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weight_0_is_trls_loss_and_gradient_to_the_bit(student, teacher, tmp_path, loss_type):
    keywords = {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 0.0}
    trainer = tiny.grpo(KDRLTrainer, student, tmp_path, keywords=keywords, loss_type=loss_type, beta=0.0)
    inputs = generated(trainer, off_policy=0.3)
    theirs = gradient(trainer, lambda *x: GRPOTrainer._compute_loss(trainer, *x), inputs)
    ours = gradient(trainer, trainer._compute_loss, inputs)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[1].abs().max() > 0


def test_a_whole_run_with_weight_0_is_trls_run(student, teacher, tmp_path):
    runs = []
    for name, cls, keywords in (
        ("theirs", GRPOTrainer, {}),
        ("ours", KDRLTrainer, {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 0.0}),
        ("alone", KDRLTrainer, {"distill_loss_weight": 0.0}),
    ):
        trainer = tiny.grpo(cls, student, tmp_path / name, keywords=keywords, gradient_accumulation_steps=2)
        trainer.train()
        logged = [{k: v for k, v in row.items() if not timed(k)} for row in trainer.state.log_history]
        runs.append((torch.cat([p.flatten() for p in trainer.model.parameters()]), logged))
    (theirs, logs), (ours, our_logs), (alone, alone_logs) = runs
    assert torch.equal(theirs, ours)
    assert torch.equal(theirs, alone)
    assert alone_logs == logs
    assert {"reward", "reward_std", "entropy", "clip_ratio/region_mean", "completions/mean_length"} <= logs[0].keys()
    added = {"distill/reverse_kl", "distill/teacher_neg_inf"}
    for theirs, ours in zip(logs[:-1], our_logs[:-1], strict=True):
        assert ours.keys() - theirs.keys() == added
        assert {k: v for k, v in ours.items() if k not in added} == theirs
        assert ours["distill/reverse_kl"] > 0


def timed(key):
    return "time" in key or "per_second" in key or "runtime" in key


LINEAR_IN_THE_RATIO = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")


@pytest.mark.parametrize(
    ("loss_type", "off_policy"), [*product(LINEAR_IN_THE_RATIO, (0.0, 0.4)), ("sapo", 0.0)], ids=str
)
def test_the_term_has_trls_denominator(student, teacher, tmp_path, loss_type, off_policy):
    """The oracle is TRL's own loss with the per-token advantage log p - log q: the same sum over the same denominator.

    Without clipping, every loss type has the gradient -ρ A ∇log q, except SAPO's gate, which has it only at ratio 1,
    and VESPO's sequence weight, which never has it. Both reduce like types that are tested here.
    """
    keywords = {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 0.7, "rl_loss_weight": 0.0}
    trainer = tiny.grpo(
        KDRLTrainer,
        student,
        tmp_path,
        keywords=keywords,
        loss_type=loss_type,
        epsilon=1e3,
        epsilon_high=1e3,
        gradient_accumulation_steps=2,
        temperature=0.8,
    )
    inputs = generated(trainer, off_policy=off_policy)
    assert_close(
        inputs["teacher_per_token_logps"] * inputs["completion_mask"],
        scored(trainer, inputs, trainer.teacher_model) * inputs["completion_mask"],
        atol=2e-5,
        rtol=1e-5,
    )
    value, ours = gradient(trainer, trainer._compute_loss, inputs)
    with torch.no_grad():
        reward = inputs["teacher_per_token_logps"] - scored(trainer, inputs)
    oracle_inputs = {**inputs, "advantages": 0.7 * reward}
    oracle_value, oracle = gradient(trainer, lambda *x: GRPOTrainer._compute_loss(trainer, *x), oracle_inputs)
    assert_close(ours, oracle, atol=2e-6, rtol=1e-4)
    if loss_type not in ("cispo", "sapo"):  # their values are not -ρ A
        assert_close(value, oracle_value, atol=1e-6, rtol=1e-5)
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_both_terms_add_up(student, teacher, tmp_path, loss_type):
    keywords = {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 0.0}
    trainer = tiny.grpo(KDRLTrainer, student, tmp_path, keywords=keywords, loss_type=loss_type)
    inputs = generated(trainer, off_policy=0.2)
    parts = []
    for rl, kd in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.25)):
        trainer.rl_loss_weight, trainer.distill_loss_weight = rl, kd
        parts.append(gradient(trainer, trainer._compute_loss, inputs))
    for of_rl, of_kd, joint in zip(*parts, strict=True):
        assert_close(joint, 0.5 * of_rl + 0.25 * of_kd, atol=1e-6, rtol=1e-5)


def test_the_ratio_is_against_the_policy_that_sampled(student, teacher, tmp_path):
    """The log-probs that a rollout engine reports are used, and a NaN among them falls back to TRL's."""
    keywords = {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 1.0, "rl_loss_weight": 0.0}
    trainer = tiny.grpo(KDRLTrainer, student, tmp_path, keywords=keywords, loss_type="bnpo")
    inputs = generated(trainer, off_policy=0.2)
    sampled = inputs["old_per_token_logps"] + 0.3 * torch.randn(inputs["old_per_token_logps"].shape)
    sampled[:, 1] = torch.nan
    inputs["sampling_per_token_logps"] = sampled
    value, ours = gradient(trainer, trainer._compute_loss, inputs)
    old = torch.where(sampled.isnan(), inputs["old_per_token_logps"], sampled)

    def expected(model, inputs):
        logp, mask = scored(trainer, inputs, model), inputs["completion_mask"]
        reward = (inputs["teacher_per_token_logps"] - logp).detach()
        return -((logp - old).exp() * reward * mask).sum() / mask.sum()

    oracle_value, oracle = gradient(trainer, expected, inputs)
    assert_close(value, oracle_value, atol=1e-6, rtol=1e-5)
    assert_close(ours, oracle, atol=2e-6, rtol=1e-4)


def test_tool_tokens_are_not_trained_on(student, teacher, tmp_path):
    keywords = {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 1.0, "rl_loss_weight": 0.0}
    trainer = tiny.grpo(KDRLTrainer, student, tmp_path, keywords=keywords, loss_type="bnpo")
    inputs = generated(trainer)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1:3] = 0
    spoiled = {**inputs, "teacher_per_token_logps": inputs["teacher_per_token_logps"].clone()}
    spoiled["teacher_per_token_logps"][:, 1:3] = torch.nan
    assert torch.equal(
        gradient(trainer, trainer._compute_loss, spoiled)[1], gradient(trainer, trainer._compute_loss, inputs)[1]
    )


@pytest.mark.parametrize(("rl", "kd"), [(0.0, 1.0), (1.0, 0.5)], ids=["distillation", "joint"])
def test_it_trains(student, teacher, tmp_path, rl, kd):
    keywords = {"teacher_model": copy.deepcopy(teacher), "rl_loss_weight": rl, "distill_loss_weight": kd}
    options = {"max_steps": 40, "per_device_train_batch_size": 32, "learning_rate": 3e-3}
    trainer = tiny.grpo(KDRLTrainer, student, tmp_path, keywords=keywords, **options)
    before = [p.clone() for p in trainer.teacher_model.parameters()]
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    names = ("reward", "loss", "distill/reverse_kl")
    first, last = ({name: sum(row[name] for row in part) / 5 for name in names} for part in (logs[:5], logs[-5:]))
    print("".join(f"{name} {first[name]:.3f} -> {last[name]:.3f}  " for name in names))
    assert last["reward"] > first["reward"] + 0.6
    assert last["distill/reverse_kl"] < 0.2 * first["distill/reverse_kl"]
    assert last["loss"] < 0.2 * first["loss"]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.teacher_model.parameters(), strict=True))


def test_checkpoints_resume(student, teacher, tmp_path):
    def run(name, resume=None, **options):
        keywords = {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 0.5}
        options = {"save_strategy": "steps", "save_steps": 3, "seed": 3, **options}
        trainer = tiny.grpo(KDRLTrainer, student, tmp_path / name, keywords=keywords, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", max_steps=6)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run("resumed", resume=str(checkpoint), max_steps=6)
    assert resumed.state.global_step == 6
    logs = [row for row in whole.state.log_history if "reward" in row]
    again = [row for row in resumed.state.log_history if "reward" in row]
    assert len(logs) == len(again) == 6
    for a, b in zip(logs, again, strict=True):
        assert a["distill/reverse_kl"] == pytest.approx(b["distill/reverse_kl"], rel=1e-5)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(checkpoint)  # the student only, without the teacher
    assert {k: v.shape for k, v in saved.state_dict().items()} == {k: v.shape for k, v in student.state_dict().items()}


def test_a_teacher_from_a_path_and_one_of_your_own(student, teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    keywords = {"teacher_model": str(tmp_path / "teacher"), "teacher_model_init_kwargs": {"dtype": "float32"}}
    keywords["distill_loss_weight"] = 0.005
    loaded = tiny.grpo(KDRLTrainer, student, tmp_path, keywords=keywords)
    inputs = generated(loaded)
    mask = inputs["completion_mask"].bool()
    expected = scored(loaded, inputs, teacher)
    assert_close(inputs["teacher_per_token_logps"][mask], expected[mask], atol=2e-5, rtol=1e-5)

    class Served(KDRLMixin, GRPOTrainer):
        def teacher_logps(self, inputs):
            return torch.full(inputs["completion_ids"].shape, -1.5)

    served = tiny.grpo(Served, student, tmp_path, keywords={"distill_loss_weight": 0.5})
    assert (generated(served)["teacher_per_token_logps"] == -1.5).all()
    served.train()
    assert served.state.global_step == 3


LORA = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8, lora_dropout=0.5)
# TRL wraps the model, or gets one that is wrapped; with beta > 0 it adds a frozen copy of the adapter to the latter
PEFT = [("peft_config", 0.0), ("peft_config", 0.1), ("PeftModel", 0.0), ("PeftModel", 0.1)]


@pytest.mark.parametrize(("wrapped_by", "beta"), PEFT)
def test_the_base_of_a_peft_student_is_a_teacher_without_its_adapters(student, tmp_path, wrapped_by, beta):
    base, alone = copy.deepcopy(student), copy.deepcopy(student)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5  # a teacher has no dropout
    given = base if wrapped_by == "peft_config" else peft.get_peft_model(base, LORA)
    config = tiny.grpo_config(tmp_path, beta=beta, learning_rate=0.1)
    trainer = of_models(given, base, config, **({"peft_config": LORA} if wrapped_by == "peft_config" else {}))
    flags = {name: x.requires_grad for name, x in trainer.model.named_parameters()}
    adapters = [name for name, trainable in flags.items() if trainable]
    assert adapters
    assert all("lora_" in name and ".ref." not in name for name in adapters)

    def excess():
        """The student's log-probs less the teacher's, which are those of the base model alone."""
        inputs = generated(trainer)
        mask = inputs["completion_mask"].bool()
        modes = {x.training for x in trainer.model.modules()}
        assert_close(
            inputs["teacher_per_token_logps"][mask], scored(trainer, inputs, alone)[mask], atol=2e-5, rtol=1e-5
        )
        assert trainer.model.training
        assert modes == {True}
        trainer.model.eval()
        found = (scored(trainer, inputs) - inputs["teacher_per_token_logps"])[mask].detach()
        return found, inputs

    at_start, inputs = excess()
    assert_close(at_start, torch.zeros_like(at_start), atol=2e-5, rtol=0)  # B is 0
    weights = dict(trainer.model.named_parameters())
    trainer._compute_loss(trainer.model, inputs).backward()
    assert {name for name, x in weights.items() if x.grad is not None} == set(adapters)
    trainer.model.zero_grad()
    frozen = {name: x.detach().clone() for name, x in weights.items() if name not in adapters}
    trainer.train()
    assert all(torch.equal(weights[name], x) for name, x in frozen.items())
    assert excess()[0].abs().max() > 1e-2
    assert {name: x.requires_grad for name, x in trainer.model.named_parameters()} == flags


def test_a_teacher_that_shares_parameters_is_refused_and_each_way_out_works(student, tmp_path):
    def make(model, teacher):
        return of_models(model, teacher, tiny.grpo_config(tmp_path))

    def pair():
        teacher, trained = tiny.model(seed=3), copy.deepcopy(student)
        teacher.set_input_embeddings(trained.get_input_embeddings())
        return trained, teacher

    trained, teacher = pair()
    message = (
        r"must share no parameters with the model that is trained, got 1 .* model\.embed_tokens\.weight: pass a copy"
    )
    with pytest.raises(ValueError, match=message):
        make(trained, teacher)
    assert all(x.requires_grad for x in trained.parameters())
    base = copy.deepcopy(student)  # two models with adapters on one base
    trained, teacher = (peft.get_peft_model(base, LORA, adapter_name=name) for name in ("default", "other"))
    with pytest.raises(ValueError, match="must share no parameters"):
        make(trained, teacher)
    for way_out in ("copy", "path"):
        trained, teacher = pair()
        other = copy.deepcopy(teacher)
        if way_out == "path":
            teacher.save_pretrained(tmp_path / "teacher")
            other = str(tmp_path / "teacher")
        make(trained, other).train()
        assert all(x.requires_grad for x in trained.parameters())


def test_evaluation_logs_the_divergence_too(student, teacher, tmp_path):
    keywords = {"teacher_model": copy.deepcopy(teacher), "eval_dataset": tiny.prompts(8), "distill_loss_weight": 0.005}
    trainer = tiny.grpo(KDRLTrainer, student, tmp_path, keywords=keywords, per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert metrics["eval_distill/reverse_kl"] > 0
    assert "eval_reward" in metrics


def test_what_cannot_work_is_refused(student, teacher, tmp_path):
    def make(**keywords):
        return tiny.grpo(KDRLTrainer, student, tmp_path, keywords={"distill_loss_weight": 0.005} | keywords)

    with pytest.raises(ValueError, match=r"teacher_model must be given where distill_loss_weight is 0.005"):
        make()
    with pytest.raises(ValueError, match="kd_discount must be 0 with direct_penalty=True"):
        make(teacher_model=teacher, direct_penalty=True, kd_discount=0.5)
    with pytest.raises(ValueError, match="teacher_model_init_kwargs must be None"):
        make(teacher_model=copy.deepcopy(teacher), teacher_model_init_kwargs={"dtype": "float32"})
    small = tiny.model(seed=3)
    small.config.vocab_size = 5
    with pytest.raises(ValueError, match="must know the student's 11 tokens, but its vocabulary has 5"):
        make(teacher_model=small)
    same = tiny.model(seed=3)
    with pytest.raises(ValueError, match="is the model that is trained"):
        of_models(same, same, tiny.grpo_config(tmp_path))
    with pytest.raises(AttributeError, match="has no attribute 'KDRL'"):
        adapter.KDRL  # noqa: B018


def test_direct_penalty_is_the_literal_form(student, teacher, tmp_path):
    keywords = {"teacher_model": copy.deepcopy(teacher), "distill_loss_weight": 1.0, "rl_loss_weight": 0.0}
    trainer = tiny.grpo(KDRLTrainer, student, tmp_path, keywords={**keywords, "direct_penalty": True}, loss_type="bnpo")
    inputs = generated(trainer)
    with pytest.warns(UserWarning, match="the teacher is not in its gradient"):
        value, ours = gradient(trainer, trainer._compute_loss, inputs)

    def literal(model, inputs):
        penalty = scored(trainer, inputs, model) - inputs["teacher_per_token_logps"]
        return kdloss.token_mean(penalty, loss_mask=inputs["completion_mask"].bool())

    oracle_value, oracle = gradient(trainer, literal, inputs)
    assert_close(value, oracle_value, atol=1e-6, rtol=1e-5)
    assert_close(ours, oracle, atol=2e-6, rtol=1e-4)


def test_launches_beside_trls_loss(student, tmp_path, monkeypatch):
    """Forward and backward from the log-probs, as on a GPU. TRL's loss gathers metrics and reads them."""
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    trainer = tiny.grpo(GRPOTrainer, student, tmp_path, loss_type="dapo", beta=0.0)
    inputs = generated(trainer, off_policy=0.3)
    old, mask = inputs["old_per_token_logps"], inputs["completion_mask"].bool()
    entropies, advantages = torch.rand(old.shape), inputs["advantages"][:, None].expand_as(old).contiguous()
    normalizer = torch.tensor(float(mask.sum()))

    def trls(logp):
        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (logp, entropies, None))
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)

    def grpo(logp):
        return kdloss.grpo_loss(logp, old, advantages, loss_mask=mask, normalizer=normalizer).loss

    def with_statistics(logp):
        kdloss.diagnostics(logp, old, loss_mask=mask, entropy=entropies)
        return grpo(logp)

    counted = {}
    for name, loss in {"trl": trls, "grpo": grpo, "statistics": with_statistics}.items():
        leaf = (old + 0.1).requires_grad_()
        with Launches() as counted[name]:
            loss(leaf).backward()
    print({name: (launches.total, launches.syncs.total()) for name, launches in counted.items()})
    assert counted["trl"].syncs.total() > 0 == counted["grpo"].syncs.total() == counted["statistics"].syncs.total()
    assert counted["grpo"].total <= 38 < counted["trl"].total
    assert counted["statistics"].total <= 67 < counted["trl"].total
