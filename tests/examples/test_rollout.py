"""Holds sampling and scoring: scoring gives the log-probs recorded at sampling, at prediction positions."""

import json
import shutil
from pathlib import Path

import opd
import pytest
import torch
from opd.models import BehaviourLogprobs, BoundVocabulary, layout, load_policy, load_tokenizer
from opd.rollout import Batch, sample, score, shift_left
from opd.task import WordProblems, reward
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close

PROBLEMS = [WordProblems(seed=5, held_out=False)[i] for i in range(6)]
CPU = torch.device("cpu")
EXAMPLES = Path(opd.__file__).parents[1]


def draw(policy, tokenizer, *, n_samples=3, max_new_tokens=24, top_p=1.0, problems=PROBLEMS) -> Batch:
    torch.manual_seed(0)
    return sample(
        policy,
        tokenizer,
        problems,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        device=CPU,
    )


def unpadded_logp(policy, batch: Batch, *, temperature: float, top_p: float = 1.0):
    """The oracle: every sequence alone, whole logits, a log-softmax; [b, t] is for the token after t."""
    expected = torch.zeros_like(batch.old_logp)
    for b, (n, p) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        ids = batch.input_ids[b, :n]
        logp = (policy.lm(ids[None]).logits[0].float() / temperature).log_softmax(-1)
        if top_p < 1:
            kept = logp.exp().sort(descending=True)
            drop = kept.values.cumsum(-1) - kept.values >= top_p
            logp = logp.masked_fill(drop.scatter(-1, kept.indices, drop), -torch.inf).log_softmax(-1)
        for t in range(p - 1, n - 1):
            expected[b, t] = logp[t, ids[t + 1]]
    return expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_and_scored_log_probs_are_those_of_each_sequence_alone(load, tokenizer, temperature):
    student = load("student", temperature=temperature)
    batch = draw(student, tokenizer)
    with torch.no_grad():
        expected = unpadded_logp(student, batch, temperature=temperature)
    assert len(set(batch.lengths.tolist())) > 1, "the case must pad"
    assert_close(batch.old_logp, expected, atol=1e-4, rtol=1e-4)
    assert_close(score(student, batch), expected, atol=1e-4, rtol=1e-4)
    assert_close(score(student, batch, parts=4), expected, atol=1e-4, rtol=1e-4)


def test_under_top_p_the_behaviour_policy_is_the_truncated_one(load, tokenizer):
    student = load("student")
    batch = draw(student, tokenizer, top_p=0.8)
    with torch.no_grad():
        expected = unpadded_logp(student, batch, temperature=1.0, top_p=0.8)
    assert_close(batch.old_logp, expected, atol=1e-4, rtol=1e-4)
    assert (score(student, batch) < batch.old_logp - 1e-3).any(), "truncation must matter in this case"


def test_entropy_is_that_of_the_whole_distribution(load, tokenizer):
    student = load("student")
    batch = draw(student, tokenizer, n_samples=1)
    where = layout(batch.input_ids, batch.lengths, batch.prompt_lengths)
    with torch.no_grad():
        entropy = student(batch.input_ids, batch.lengths, batch.prompt_lengths).entropy
        n = int(batch.lengths[0])
        probabilities = torch.distributions.Categorical(logits=student.lm(batch.input_ids[:1, :n]).logits[0])
    assert_close(entropy[:n], torch.where(where.loss_mask[:n], probabilities.entropy(), 0.0), atol=1e-4, rtol=1e-4)


def test_rows_hold_prompt_and_response_and_the_reward_is_the_verifiers(load, tokenizer):
    batch = draw(load("student"), tokenizer, n_samples=2)
    for b in range(len(batch)):
        problem = PROBLEMS[b // 2]
        prompt = tokenizer(problem.prompt)["input_ids"]
        row = batch.input_ids[b, : batch.lengths[b]].tolist()
        assert row[: batch.prompt_lengths[b]] == prompt
        response = row[len(prompt) :]
        assert tokenizer.eos_token_id not in response[:-1]
        assert response[-1] == tokenizer.eos_token_id or len(response) == 24
        assert batch.rewards[b] == reward(tokenizer.decode(response, skip_special_tokens=True), problem)
        assert (batch.input_ids[b, batch.lengths[b] :] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("end", ["", " <eos>"], ids=["no end", "end"])
@pytest.mark.parametrize("template", [False, True])
def test_a_prompt_begins_with_one_beginning_of_sequence(load, template, end):
    """A base model was trained with it: without a chat template the tokenizer adds it, a chat template writes it.

    Some tokenizers add an end of sequence too, which does not belong at the end of a prompt.
    """
    tokenizer = load_tokenizer(str(EXAMPLES / "tiny" / "student"))
    bos = "#"  # any token of the tiny vocabulary
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A{end}", special_tokens=[(x, tokenizer.convert_tokens_to_ids(x)) for x in (bos, "<eos>")]
    )
    if template:
        tokenizer.chat_template = bos + "{{ messages[0]['content'] }}"
    batch = draw(load("student"), tokenizer, n_samples=1)
    for b, problem in enumerate(PROBLEMS):
        prompt = tokenizer.convert_ids_to_tokens(batch.input_ids[b, : batch.prompt_lengths[b]])
        assert prompt == [bos, *tokenizer.tokenize(problem.prompt, add_special_tokens=False)]


def test_every_token_that_the_model_ends_a_sequence_with_ends_a_response(tokenizer, tmp_path):
    """Several models have a list of them, the tokenizer has one. A policy that is saved keeps its list."""
    path = tmp_path / "model"
    shutil.copytree(EXAMPLES / "tiny" / "student", path)
    config = json.loads((path / "generation_config.json").read_text())
    second = tokenizer.convert_tokens_to_ids("=")
    (path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [second, 7]}))
    keywords = {"vocab_size": len(tokenizer), "temperature": 1.0, "dtype": "float32", "trained": True}
    student = load_policy(str(path), **keywords)
    ends = student.end_ids(tokenizer)
    assert ends == sorted([second, 7, tokenizer.eos_token_id])
    batch = draw(student, tokenizer)
    last = []
    for row, n, prompt in zip(batch.input_ids.tolist(), batch.lengths, batch.prompt_lengths, strict=True):
        response = row[prompt:n]
        assert not {*ends} & {*response[:-1]}
        assert response[-1] in ends or len(response) == 24
        last.append(response[-1])
    assert second in last, "the case must end by the second token"
    with torch.no_grad():
        assert_close(batch.old_logp, unpadded_logp(student, batch, temperature=1.0), atol=1e-4, rtol=1e-4)
    student.save_pretrained(tmp_path / "saved", tokenizer)
    assert load_policy(str(tmp_path / "saved"), **keywords).end_ids(tokenizer) == ends


def test_without_a_list_the_tokenizer_ends_a_response(load, tokenizer):
    student = load("student")
    student.lm.generation_config.eos_token_id = None
    assert student.end_ids(tokenizer) == [tokenizer.eos_token_id]
    student.lm.generation_config.eos_token_id = 5
    assert student.end_ids(tokenizer) == sorted([5, tokenizer.eos_token_id])


def test_a_response_cut_by_the_limit_is_kept_whole(load, tokenizer):
    batch = draw(load("student"), tokenizer, max_new_tokens=3)
    assert (batch.lengths - batch.prompt_lengths).eq(3).all()
    assert batch.rewards.eq(0).all()
    assert batch.old_logp[:, -1].eq(0).all()


def test_padding_rows_of_the_head_are_never_sampled():
    scores = torch.tensor([[0.0, 1.0, 50.0]])
    record = BehaviourLogprobs()
    record(torch.tensor([[0]]), BoundVocabulary(2)(None, scores.clone()))
    assert_close(record.read(torch.tensor([[1]])), torch.tensor([[1.0, 0.0]]).log_softmax(-1)[:, :1])


def test_steps_that_generation_takes_back_are_not_read():
    record = BehaviourLogprobs()
    scores = torch.tensor([[0.5, 0.25, 0.25]]).log()
    for last in (0, 1, 2):
        record(torch.tensor([[last]]), scores)
    assert_close(record.read(torch.tensor([[1, 2]])).exp(), torch.tensor([[0.25, 0.25]]))


def test_shift_left():
    x, keep = torch.arange(1.0, 9).reshape(2, 4), torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).bool()
    assert shift_left(x, keep, fill=-1).tolist() == [[2, 4], [8, -1]]


def test_splitting_cuts_rows_to_their_own_length(load, tokenizer):
    batch = draw(load("student"), tokenizer)
    parts = batch.split(4)
    assert sum(map(len, parts)) == len(batch)
    for part in parts:
        assert part.input_ids.shape[1] == part.lengths.max()
    assert torch.cat([p.lengths for p in parts]).equal(batch.lengths)
