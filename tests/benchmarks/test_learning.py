"""Holds the learning study: its task by hand, its sampling, its budgets and seeds, how it resumes, what it reports."""

from __future__ import annotations

import json
import statistics
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import kdloss
from benchmarks.learning import __main__ as command, figures, jobs, plan, report, train
from benchmarks.learning.methods import METHODS, Batch
from benchmarks.learning.model import Transformer, sample
from benchmarks.learning.plan import CHOOSING, CONFIRMING, EXPLORING, TASKS, Run, Writer
from benchmarks.learning.task import (
    END,
    EQUALS,
    IGNORED,
    PAD,
    Messages,
    is_held_out,
    labels_of,
    prompts,
    right_answers,
    stream,
    verify,
    writer,
    written,
)

ADDING = (torch.arange(6)[:, None] + torch.arange(6)) % 6  # y_i = y_(i-1) + x_i modulo 6
TINY = {
    "updates": 4,
    "every": 2,
    "questions": 30,
    "curve_questions": 20,
    "prompts": 4,
    "teacher": Writer(slips=0.02, steps=2, batch=8),
    "student": Writer(slips=0.35, steps=2, batch=8),
}


# --- the task --------------------------------------------------------------------------------------------------------


def test_answers_by_hand():
    messages = torch.tensor([[1, 2, 5], [4, PAD, PAD]])
    assert prompts(messages).tolist() == [[1, 2, 5, EQUALS], [4, PAD, PAD, EQUALS]]
    # 0 + 1, 1 + 2, 3 + 5 - 6
    assert right_answers(ADDING, messages).tolist() == [[1, 3, 2, END, PAD], [4, END, PAD, PAD, PAD]]


def test_the_verifier_wants_the_whole_answer_and_nothing_after_it():
    right = torch.tensor([[1, 3, END, PAD]]).expand(6, 4)
    given = torch.tensor(
        [[1, 3, END, PAD], [1, 3, END, 2], [1, 2, END, PAD], [1, END, PAD, PAD], [1, 3, 3, END], [1, 3, PAD, END]]
    )
    assert verify(given, right).tolist() == [1, 1, 0, 0, 0, 0]
    assert labels_of(given)[1].tolist() == [1, 3, END, IGNORED]
    assert labels_of(torch.tensor([[1, 3, 3, 3]])).tolist() == [[1, 3, 3, 3]]  # never ends: all of it counts


def test_a_tenth_of_the_messages_is_for_evaluation_only():
    messages, generator = Messages(5, 7), stream("cpu", "test")
    train_on, held_out = messages.draw(2000, generator), messages.draw(500, generator, held_out=True)
    assert train_on.shape == (2000, 7)
    assert not set(map(tuple, train_on.tolist())) & set(map(tuple, held_out.tolist()))
    lengths = (train_on != PAD).sum(1)
    assert all(500 < int((lengths == n).sum()) < 800 for n in (5, 6, 7))
    assert 0.08 < is_held_out(torch.randint(6, (5000, 22), generator=generator)).float().mean() < 0.12


def test_a_writer_slips_and_believes_wrong_facts():
    facts = writer(ADDING, slips=0.06, wrong=6, trust=0.7, generator=stream("cpu", "facts"))
    torch.testing.assert_close(facts.sum(-1), torch.ones(6, 6).double())
    right = facts.gather(2, ADDING.unsqueeze(-1)).flatten()
    assert sorted({round(x, 6) for x in right.tolist()}) == [round(0.94 * 0.3 + 0.01, 6), 0.95]
    assert int((right < 0.5).sum()) == 6
    random = writer(ADDING, slips=1.0, wrong=0, trust=0.0, generator=stream("cpu", "facts"))
    torch.testing.assert_close(random, torch.full((6, 6, 6), 1 / 6).double())
    perfect = writer(ADDING, slips=0.0, wrong=0, trust=0.0, generator=stream("cpu", "facts"))
    messages = Messages(2, 4).draw(20, stream("cpu", "messages"))
    assert torch.equal(written(perfect, messages, stream("cpu", "answers")), right_answers(ADDING, messages))


def test_streams_depend_on_their_names_alone():
    first, again, other = (torch.rand(3, generator=stream("cpu", "a", x)) for x in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- the model -------------------------------------------------------------------------------------------------------


def test_sampling_with_a_cache_draws_from_the_logits_of_the_whole_forward():
    messages = Messages(5, 7)
    model = Transformer(messages.prompt_width + messages.answer_width, stream("cpu", "init"))
    asked = prompts(messages.draw(50, stream("cpu", "messages")))
    answers, drawn_from = sample(model, asked, messages.answer_width, stream("cpu", "answers"))
    with torch.no_grad():
        whole = model(torch.cat([asked, answers], 1)[:, :-1])[:, messages.prompt_width - 1 :]
        logits = model.answer_logits(torch.cat([asked, answers], 1), messages.prompt_width)
    torch.testing.assert_close(logits, whole)
    labels = labels_of(answers)
    trained = labels != IGNORED
    torch.testing.assert_close(drawn_from[trained], logits[trained], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        kdloss.token_logprobs(drawn_from, labels), kdloss.token_logprobs(logits, labels), rtol=1e-4, atol=1e-4
    )
    assert (answers[~trained] == PAD).all()


def test_tokens_are_drawn_with_their_probabilities():
    model = Transformer(10, stream("cpu", "init"))
    answers, logits = sample(model, torch.full((20_000, 2), 3), 1, stream("cpu", "answers"))
    shares = torch.bincount(answers.flatten(), minlength=9) / 20_000
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), rtol=0, atol=0.012)


def test_a_token_does_not_see_later_ones():
    model, tokens = Transformer(8, stream("cpu", "init")), torch.tensor([[1, 2, 3, 4, 5, 0, 1, 2]])
    changed = tokens.clone()
    changed[0, 5] = 3
    for logits_from in (0, 3):
        first, second = model(tokens, logits_from=logits_from), model(changed, logits_from=logits_from)
        assert torch.equal(first[:, : 5 - logits_from], second[:, : 5 - logits_from])
        assert not torch.equal(first[:, 5 - logits_from :], second[:, 5 - logits_from :])


# --- the methods -----------------------------------------------------------------------------------------------------


def batch(rewards: list[float], *, old: bool = True) -> Batch:
    """Four answers of four positions to two prompts, on-policy."""
    generator = stream("cpu", "batch")
    logits, teacher_logits = (torch.randn(16, 9, generator=generator) for _ in range(2))
    labels = torch.randint(9, (16,), generator=generator)
    labels[[3, 10, 11]] = IGNORED
    return Batch(
        logits=logits.requires_grad_(),
        labels=labels,
        old_logp=kdloss.token_logprobs(logits.detach(), labels) if old else None,
        teacher_logits=teacher_logits,
        rewards=torch.tensor(rewards),
        cu_seqlens=torch.arange(0, 17, 4),
        group_size=2,
        step=0,
        updates=10,
    )


def gradient(method: str, rewards: list[float], **changes) -> torch.Tensor:
    b = replace(batch(rewards), **changes)
    return torch.autograd.grad(METHODS[method].loss(b), b.logits)[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_gradient_and_none_after_the_end_of_an_answer(method):
    found = gradient(method, [1.0, 0.0, 0.0, 0.0])
    assert found.isfinite().all()
    assert found.any()
    assert not found[[3, 10, 11]].any()


@pytest.mark.parametrize("method", ["stale-8-ratio", "stale-8-no-ratio", "stale-8-frozen-ratio", "stale-8-folded"])
def test_on_policy_all_ways_with_stale_rollouts_are_distillation(method):
    rewards = [1.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(gradient(method, rewards), gradient("sampled", rewards, old_logp=None))


def test_where_the_teacher_is_left_out_only_the_reward_is_left():
    mixed, failing = [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    for method in ("kdrl-hopeless", "forward-hopeless-and-grpo"):
        torch.testing.assert_close(gradient(method, mixed), gradient("grpo", mixed))
    torch.testing.assert_close(gradient("kdrl-hopeless", failing), 0.3 * gradient("sampled", failing))
    torch.testing.assert_close(gradient("forward-hopeless-and-grpo", failing), gradient("full-forward", failing))
    failed = gradient("kdrl-failed", mixed) - gradient("grpo", mixed)
    assert not failed.view(4, 4, 9)[[0, 2]].any()
    assert failed.view(4, 4, 9)[[1, 3]].any()


def test_schedules_start_and_end_where_their_labels_say():
    rewards = [1.0, 0.0, 0.0, 0.0]
    for method, first, last in (
        ("kdrl-annealed", "kdrl-1", "grpo"),
        ("kdrl-switched", "sampled", "grpo"),
        ("sft-then-grpo", "sft", "grpo"),
    ):
        torch.testing.assert_close(gradient(method, rewards), gradient(first, rewards))
        torch.testing.assert_close(gradient(method, rewards, step=10), gradient(last, rewards))


def test_the_literal_form_ignores_the_teacher():
    rewards = [1.0, 0.0, 0.0, 0.0]
    other = {"teacher_logits": batch(rewards).teacher_logits.flip(-1)}
    assert torch.equal(gradient("literal-1", rewards), gradient("literal-1", rewards, **other))
    assert not torch.equal(gradient("kdrl-1", rewards), gradient("kdrl-1", rewards, **other))


# --- one run ---------------------------------------------------------------------------------------------------------


class CountingSampler:
    """In place of `Sampler`: each rollout is the number of updates that its student has had."""

    def __init__(self, updates: int) -> None:
        self.world = type("World", (), {"task": replace(TASKS["A"], updates=updates)})
        self.teacher, self.samples = "teacher", 0

    def __call__(self, student, *, stale: bool = False):
        self.samples += 1
        return student


@pytest.mark.parametrize("method", ["sampled", "stale-1-ratio", "stale-8-ratio", "sft", "sft-then-grpo"])
def test_every_method_samples_once_an_update_from_the_student_of_its_age(method):
    sampler, waiting, updates, its = CountingSampler(20), deque(), 20, METHODS[method]
    seen = [train._next_rollout(its, step, step, sampler, waiting) for step in range(updates)]
    assert sampler.samples == updates
    text = round(its.teacher_text * updates)
    assert seen == ["teacher"] * text + [max(0, step - its.age) for step in range(text, updates)]


def test_a_run_depends_on_its_seeds_and_not_on_what_ran_before(tmp_path):
    task = replace(TASKS["D"], **TINY)
    world = train.World(task, 1, tmp_path / "a", "cpu")
    first = train.train(Run("D", "kdrl-1", 3e-3, 1, 5), world)
    torch.manual_seed(0)
    train.train(Run("D", "grpo", 3e-3, 1, 6), world)
    assert train.train(Run("D", "kdrl-1", 3e-3, 1, 5), world) == first
    assert train.train(Run("D", "kdrl-1", 3e-3, 1, 5), train.World(task, 1, tmp_path / "b", "cpu")) == first
    assert train.train(Run("D", "kdrl-1", 3e-3, 1, 6), world) != first
    assert len(first["curve"]) == 3


@pytest.fixture
def tiny(monkeypatch):
    """Two tasks of four updates, and one or two methods each."""
    for name, methods in (("A", ("sampled",)), ("D", ("grpo", "sampled"))):
        monkeypatch.setitem(TASKS, name, replace(TASKS[name], **TINY, methods=methods, fewer=methods[:1]))
    monkeypatch.setattr(
        jobs, "EXACT", replace(plan.EXACT, methods=("sampled",), checkpoints=(1,), batches=2, chunks=1, answers=64)
    )
    seeds = plan.Seeds((1, 2), (3,))
    for module in (plan, command, jobs):
        monkeypatch.setattr(module, "CONFIRMING", seeds)
    for module in (plan, command):
        monkeypatch.setattr(module, "CHOOSING", plan.Seeds((4,), (5,)))


def test_a_killed_study_goes_on_and_ends_with_the_same_result(tiny, tmp_path):
    def studied(folder):
        with ThreadPoolExecutor(1) as pool:
            result = command.study(["A", "D"], jobs.Records(folder / "records.jsonl", pool, "cpu"))
        return {key: value for key, value in result.items() if key != "facts"}

    whole = studied(tmp_path / "whole")
    lines = (tmp_path / "whole" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    half = len(lines) // 2
    (tmp_path / "killed" / "records.jsonl").write_text("".join(lines[:half]) + lines[half][:20])
    assert json.dumps(studied(tmp_path / "killed")) == json.dumps(whole)
    ours = (tmp_path / "killed" / "records.jsonl").read_text().splitlines(keepends=True)
    assert ours[:half] == lines[:half]
    assert len(ours) == len(lines)
    # what was measured, and how it is laid out
    noise = whole["measured"]["exact/A/1/3/1"]["sampled"]
    assert -1 <= noise["cosine"] <= 1
    assert whole["measured"]["effect/D/1/3"]["literal joint form 1"] == 0.0


# --- the plan --------------------------------------------------------------------------------------------------------


def test_seeds_of_exploring_choosing_and_confirming_are_disjoint():
    for kind in ("tables", "students"):
        seeds = [seed for each in (EXPLORING, CHOOSING, CONFIRMING) for seed in getattr(each, kind)]
        assert len(seeds) == len(set(seeds))
    assert len(CONFIRMING.tables) >= 3
    assert len(CONFIRMING.students) >= 5


def test_every_method_is_in_the_plan_and_every_planned_one_exists():
    assert {method for task in TASKS.values() for method in task.methods} == set(METHODS)


def test_all_methods_of_a_task_have_the_same_rates_seeds_and_budget():
    for task in TASKS.values():
        assert task.updates % task.every == 0
        assert len(task.methods) == len(set(task.methods))
        assert set(task.fewer) <= set(task.methods)
        by_method: dict[str, list[tuple]] = {}
        for run in plan.choosing_runs(task):
            by_method.setdefault(run.method, []).append((run.rate, run.table, run.student))
        assert len({tuple(runs) for runs in by_method.values()}) == 1
        confirming = plan.confirming_runs(task, dict.fromkeys(by_method, 6e-3))
        assert set(task.methods) - set(by_method) == (set(task.fewer) if task.common_rate else set())
        assert len({run.name for run in confirming}) == len(confirming)
        for method in task.methods:
            seeds = {(run.table, run.student) for run in confirming if run.method == method}
            assert len(seeds) == (9 if method in task.fewer else 15)


def test_what_is_compared_and_measured_is_run_with_all_seeds_or_said_to_be_fewer():
    for claim in (*plan.COMPARISONS, *plan.BOUNDS):
        named = (claim.method,) if isinstance(claim, plan.Bound) else (claim.better, *claim.others)
        assert set(named) <= set(TASKS[claim.task].methods)
    assert set(plan.EXACT.methods) <= set(TASKS[plan.EXACT.task].methods)
    assert max(plan.EXACT.checkpoints) < TASKS[plan.EXACT.task].updates
    for claim in plan.BOUNDS:
        assert claim.method not in TASKS[claim.task].fewer


def test_the_plan_fits_into_100_minutes_of_two_cores_and_the_look_into_3():
    found = []
    for task in TASKS.values():
        # none is the common rate, so that all run twice
        rates = {run.method: 6e-3 for run in plan.choosing_runs(task)}
        found += jobs.preparations(task, CHOOSING, CONFIRMING) + jobs.measurements(task)
        found += [jobs.Job("run", run) for run in (*plan.choosing_runs(task), *plan.confirming_runs(task, rates))]
    assert len({job.name for job in found}) == len(found)
    assert sum(job.seconds for job in found) < 2 * 100 * 60
    quick = []
    for task in plan.QUICK_TASKS.values():
        quick += jobs.preparations(task, plan.QUICK, quick=True)
        quick += [jobs.Job("run", run, quick=True) for run in plan.quick_runs(task)]
    assert sum(job.seconds for job in quick) < 2 * 3 * 60


# --- the report ------------------------------------------------------------------------------------------------------


def made_up() -> dict:
    """A result of the whole plan: each accuracy is that of its method, plus a hundredth of the student's seed."""
    levels = {name: 0.1 + 0.01 * i for i, name in enumerate(METHODS)}

    def end(run: Run) -> dict:
        accuracy = round(levels[run.method] + 0.01 * run.student, 3)
        task = TASKS[run.task]
        curve = [round(accuracy * i / (task.updates // task.every), 3) for i in range(task.updates // task.every + 1)]
        return {"curve": curve, "accuracy": accuracy, "reverse_kl": 0.12345, "entropy": 0.12345, "length": 6.123}

    choosing = [run for task in TASKS.values() for run in plan.choosing_runs(task)]
    chosen: dict[str, dict[str, float]] = {}
    for run in choosing:
        chosen.setdefault(run.task, {})[run.method] = 6e-3
    runs = [run for task in TASKS.values() for run in plan.confirming_runs(task, chosen[task.name])]
    noise = {"cosine": 0.1234, "spread": 0.1, "signal_to_noise": 0.1234}
    return {
        "facts": {"processor": "A", "device": "cpu", "torch": "2", "kdloss": "0", "date": "2026-01-01", "seconds": 9},
        "explored": ["a look"],
        "start": {
            job.name: {"accuracy": 0.9 if job.kind == "teacher" else 0.1}
            for task in TASKS.values()
            for job in jobs.preparations(task, CONFIRMING)
        },
        "choosing": [{**vars(run), "accuracy": end(run)["accuracy"]} for run in choosing],
        "chosen": chosen,
        "runs": [{**vars(run), **end(run)} for run in runs],
        "measured": {
            job.name: dict.fromkeys(plan.EXACT.methods, noise) if job.kind == "exact" else {"GRPO": 0.0, "KDRL 1": 0.5}
            for task in TASKS.values()
            for job in jobs.measurements(task)
        },
    }


def test_estimates_by_hand():
    found = report.estimate([1.0, 2.0, 3.0, 4.0, 5.0])  # a standard deviation of sqrt(2.5)
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert str(report.estimate([0.5])) == ".500"
    assert report.estimate(list(range(60))).half == pytest.approx(2.001 * statistics.stdev(range(60)) / 60**0.5, 1e-3)


def test_updates_to_half_by_hand():
    assert report.updates_to_half({"task": "A", "curve": [0, 0.1, 0.3, 0.5, 0.6, 0.7]}) == 20  # half of .6
    assert report.updates_to_half({"task": "A", "curve": [0, 0.004, 0.0, 0.0]}) is None


def test_a_report_of_made_up_results(tmp_path):
    result = made_up()
    written = report.write(result, tmp_path)
    assert json.loads(written[0].read_text()) == result
    assert written[0].stat().st_size < 1_000_000
    text = written[1].read_text()
    # levels of 0.1 and 0.13, with the students 1 to 3 and 1 to 5
    assert (
        "| GRPO | 0.006 | 9 | .120 ± .007 | .120 ± .025 | .120 ± .025 | .120 ± .025 | 100 | 0.123 | 0.123 | 6.12 |"
        in text
    )
    assert "| full reverse KL | 0.006 | 15 | .160 ± .008 | .160 ± .020 |" in text
    assert "| A | each its best | full reverse KL above sampled reverse KL |" in text
    assert "Change of the gradient on one batch under another teacher, as a share of it: GRPO 0; KDRL 1 0.5." in text
    assert all(task.title in text for task in TASKS.values())


def test_a_comparison_counts_the_tables_on_which_it_holds():
    result = made_up()
    for run in result["runs"]:
        if run["task"] == "B" and run["method"] == "kdrl-.3":
            run["accuracy"] += 0.5 if run["table"] != 303 else -0.1
    claims = {row.split(" | ")[2]: row for row in report.comparisons(result).splitlines()}
    assert claims["KDRL .3 above GRPO, sampled reverse KL by .250"].endswith("| 2 of 3 |")


def test_paired_differences_by_hand():
    result = made_up()
    for run in result["runs"]:
        if run["task"] == "A" and run["method"] in ("full-reverse", "sampled"):
            run["accuracy"] = run["student"] / 10 + (run["table"] / 1000 if run["method"] == "full-reverse" else 0)
    (row,) = (x for x in report.paired(result).splitlines() if "full reverse KL - sampled reverse KL" in x)
    half = report.estimate([0.301] * 5 + [0.302] * 5 + [0.303] * 5).half
    assert row.endswith(f"| +0.302 ± {half:.3f} | 15 of 15 |")


def test_blocks_of_a_page_are_renewed():
    result = made_up()
    end = "<!-- end of learning -->\n"
    page = f"# Page\n\n<!-- learning: rates -->\nreplaced\n{end}\n<!-- learning: none -->\nkept\n{end}"
    renewed = report.documented(page, result)
    assert "replaced" not in renewed
    assert "kept" in renewed
    assert report.rates_table(result) in renewed
    assert report.documented(renewed, result) == renewed


def test_a_figure_per_task(tmp_path):
    pytest.importorskip("matplotlib")
    assert [path.name for path in figures.draw(made_up(), tmp_path)] == ["A.png", "B.png", "C.png", "D.png"]


def test_only_the_whole_study_is_saved(capsys):
    assert command.main(["--quick", "--save"]) == 2
    assert command.main(["--task", "A", "--save"]) == 2
    assert "--out DIR" in capsys.readouterr().err
