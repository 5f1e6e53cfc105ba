"""Tests the top-k loss inside TRL's ServerDistillationTrainer: unbiased for any k, and it trains.

A stand-in answers for the server, in the form of vLLM's answers: the k most likely tokens and the one that was sent.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.generation import vllm_client

import kdloss
from kdloss.integrations import trl as adapter

sys.path.insert(0, str(Path(__file__).parent))
import tiny

HOOK = "_compute_server_sparse_top_1_divergence_loss"
THEIRS = getattr(ServerDistillationTrainer, HOOK)


class Server(vllm_client.VLLMClient):
    """TRL's client, whose requests a model in this process answers."""

    teacher = None

    def __init__(self, **options):
        self.base_url, self.model = "", ""

    def _post(self, url, *, json):
        return {"choices": [self.answer(tokens, json["prompt_logprobs"]) for tokens in json["prompt"]]}

    def answer(self, tokens, k):
        with torch.no_grad():
            rows = self.teacher(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        scores = []
        for row, token in zip(rows, tokens[1:], strict=True):
            ranks = row.argsort(descending=True).argsort()
            kept = {*row.topk(k).indices.tolist(), token}
            scores.append({str(x): {"logprob": row[x].item(), "rank": ranks[x].item() + 1} for x in kept})
        return {"prompt_logprobs": [None, *scores]}


@pytest.fixture(scope="module")
def teacher():
    return tiny.alphabetical_teacher()


@pytest.fixture
def installed(monkeypatch, teacher):
    monkeypatch.setattr(ServerDistillationTrainer, HOOK, THEIRS)
    monkeypatch.setattr(vllm_client, "VLLMClient", Server)
    monkeypatch.setattr(Server, "teacher", teacher)
    adapter.install_server_distillation()


def trainer(folder, *, k=4, **options):
    arguments = {
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "learning_rate": 3e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "beta": 1.0,
        "teacher_model_server_url": "http://localhost",
        **options,
    }
    made = ServerDistillationTrainer(
        model=copy.deepcopy(tiny.model(seed=1)),
        args=ServerDistillationConfig(output_dir=str(folder), **arguments),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    made.loss_top_k = k
    return made


def generated(of):
    of.model.train()
    of.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    inputs = of._prepare_inputs([of.train_dataset[i] for i in range(8)])
    length = inputs["completion_mask"].shape[1]
    inputs["completion_mask"] *= torch.arange(length) < (1 + torch.arange(8) % length)[:, None]
    return inputs


@pytest.mark.parametrize("k", [1, 4])
def test_the_loss_is_the_mean_over_the_completion_tokens(tmp_path, installed, teacher, k):
    """Against the full distributions of both models: the k most likely tokens are exact, the others sampled."""
    made = trainer(tmp_path, k=k)
    inputs = generated(made)
    loss = made.compute_loss(made.model, inputs)
    ids, attended = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    mask, tokens = inputs["completion_mask"].bool(), inputs["completion_ids"]
    with torch.no_grad():
        student, of_teacher = (
            model(input_ids=ids, attention_mask=attended).logits[:, -mask.shape[1] - 1 : -1].log_softmax(-1)
            for model in (made.model, teacher)
        )
    gap = student - of_teacher
    top = of_teacher.topk(k).indices
    exact = (student.exp() * gap).gather(-1, top).sum(-1)
    outside = (top != tokens[..., None]).all(-1)
    sampled = torch.where(outside, gap.gather(-1, tokens[..., None])[..., 0], 0)
    assert outside[mask].any()
    # float32: prompts are padded on the left for the student and not for the server
    assert_close(loss.detach(), (exact + sampled)[mask].mean(), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in made.model.parameters())


def expected_gradient(loss, k):
    """Over every token that the student may sample at one position; TRL pads what is missing with -inf and id 0."""
    torch.manual_seed(3)
    logits, teacher_logits = torch.randn(2, 7, dtype=torch.float64)
    teacher_logp, q = teacher_logits.log_softmax(-1), logits.softmax(-1)
    top = teacher_logp.topk(k)
    padded = torch.nn.functional.pad(top.values, (0, 2), value=-torch.inf), torch.nn.functional.pad(top.indices, (0, 2))
    total = torch.zeros(7, dtype=torch.float64)
    for token in range(7):
        row = logits.clone().requires_grad_()
        result = {
            "actual_logprobs": teacher_logp[token].expand(1, 1),
            "topk_logprobs": padded[0].expand(1, 1, -1),
            "topk_token_ids": padded[1].expand(1, 1, -1),
        }
        sampled = torch.tensor([[token]])
        total += (
            q[token] * torch.autograd.grad(loss(result, row.log_softmax(-1).expand(1, 1, 7), sampled, sampled), row)[0]
        )
    row = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(kdloss.reverse_kl(row, teacher_logits), row)
    return total, exact


@pytest.mark.parametrize("k", [1, 3])
def test_its_expected_gradient_is_that_of_the_reverse_kl(tmp_path, installed, k):
    made = trainer(tmp_path)
    assert_close(*expected_gradient(getattr(made, HOOK), k))
    theirs, exact = expected_gradient(lambda *x: THEIRS(made, *x), 1)
    assert (theirs - exact).norm() > 0.1 * exact.norm()
    assert torch.cosine_similarity(theirs, exact, 0) < 0.99


def test_it_trains(tmp_path, installed):
    made = trainer(tmp_path, max_steps=25, learning_rate=1e-2, lr_scheduler_type="constant")
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_what_is_not_scored_and_what_is_not_comparable_is_refused(tmp_path, installed, monkeypatch):
    made = trainer(tmp_path / "a")
    inputs = generated(made)
    for name, value in (("beta", 0.5), ("temperature", 0.7)):
        with monkeypatch.context() as changed:
            changed.setattr(made, name, value)
            with pytest.raises(ValueError, match=rf"args\.{name} must be .* after install_server_distillation, got 0"):
                made.compute_loss(made.model, inputs)
    whole = Server.answer

    def without_the_sent_token(self, tokens, k):
        answer = whole(self, tokens, k)
        for scores, token in zip(answer["prompt_logprobs"][1:], tokens[1:], strict=True):
            scores.pop(str(token))
        return answer

    monkeypatch.setattr(Server, "answer", without_the_sent_token)
    trained = int(inputs["completion_mask"].sum())
    with pytest.raises(ValueError, match=f"no log-prob of {trained} completion tokens"):
        made.compute_loss(made.model, inputs)
