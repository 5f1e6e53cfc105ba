"""Holds whole runs of a few updates: every mode, the output on screen, the picture, GSM8K files and the demo."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import demo
import matplotlib.image
import on_policy_distillation
import pytest
import torch
from opd.config import MODES
from opd.plots import apart, draw, read_trials, table
from opd.task import WordProblems
from safetensors.torch import load_file

DOCS = Path(demo.__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:direct_penalty")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def is_drawn(path: Path) -> bool:
    """Whether a picture is not blank: several colours, on a fair part of it."""
    pixels = matplotlib.image.imread(path)[..., :3]
    inked = (pixels < 0.98).any(-1)
    return 0.01 < inked.mean() < 0.9 and len({tuple(p) for p in (pixels[inked][::97] * 15).astype(int)}) > 5


def test_every_mode_runs_and_all_are_compared(small, tmp_path, capsys):
    for mode in MODES:
        assert on_policy_distillation.main(small(f"mode={mode}")) == 0
    told = capsys.readouterr().out
    experiment = tmp_path / "test"
    assert is_drawn(experiment / "reward_curve.png")
    assert {trial.mode for trial in read_trials(experiment)} == set(MODES)
    for line in ("student before", "teacher", *MODES):
        assert f"\n{line} " in told
    assert "±" in told
    for mode in MODES:
        first, *rest = records(experiment / mode)
        assert first["step"] == 0
        assert 0 <= first["accuracy"] <= 1
        assert first["teacher_accuracy"] == 1.0
        assert [r["step"] for r in rest] == [1, 2, 3, 4]
        assert ["accuracy" in r for r in rest] == [False, True, False, True]
        assert all(0 <= r["reward"] <= 1 and r["entropy"] > 0 for r in rest)
        assert all(("reverse_kl" in r) == (mode != "sft") for r in rest)
        assert all((r["distill_loss_weight"] == 0) == (mode == "grpo") for r in rest)
        assert (experiment / mode / "student" / "model.safetensors").exists()


def test_equal_runs_write_equal_bytes_and_seeds_differ(small, tmp_path):
    for trial, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert on_policy_distillation.main(small(f"trial_name={trial}", f"seed={seed}", "total_train_steps=2")) == 0
    a, b, c = ((tmp_path / "test" / trial / "metrics.jsonl").read_bytes() for trial in "abc")
    assert a == b
    assert a != c


def test_stale_rollouts_mini_batches_and_schedules(small, tmp_path):
    more = [
        "rollout.max_head_offpolicyness=2",
        "actor.ppo_n_minibatches=2",
        "actor.mb_spec.n_mbs=2",
        "actor.optimizer.lr=3e-3",
        "schedule.name=switch",
        "schedule.before=1.0",
        "schedule.after=0.0",
        "schedule.at=2",
    ]
    assert on_policy_distillation.main(small(*more)) == 0
    rest = records(tmp_path / "test" / "kdrl")[1:]
    assert [r["distill_loss_weight"] for r in rest] == [1, 1, 0, 0]
    assert rest[3]["behaviour_kl"] > rest[0]["behaviour_kl"]


def test_bfloat16_computes_and_float32_weights_are_trained(small, tmp_path):
    assert on_policy_distillation.main(small("actor.dtype=bfloat16", "total_train_steps=2")) == 0
    assert all(r["behaviour_kl"] < 1e-2 for r in records(tmp_path / "test" / "kdrl")[1:])
    weights = load_file(tmp_path / "test" / "kdrl" / "student" / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float32}
    start = load_file(Path(on_policy_distillation.__file__).parent / "tiny" / "student" / "model.safetensors")
    assert all((weights[name] - start[name].float()).abs().max() < 1e-3 for name in weights)
    assert any((weights[name] != weights[name].bfloat16()).any() for name in weights)


def test_a_gsm8k_file_is_trained_and_evaluated_on(small, tmp_path):
    for name, held_out in (("train", False), ("test", True)):
        rows = [WordProblems(seed=1, held_out=held_out)[i] for i in range(10)]
        lines = [json.dumps({"question": p.prompt, "answer": p.solution.replace("#", "\n#### ")}) for p in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = [f"data.path={tmp_path}/train.jsonl", f"data.eval_path={tmp_path}/test.jsonl", "total_train_steps=2"]
    assert on_policy_distillation.main(small(*data)) == 0
    assert len(records(tmp_path / "test" / "kdrl")) == 3


def test_mistakes_end_with_one_line_and_status_2(small, capsys):
    assert on_policy_distillation.main(small("actor.optimizer.lrr=1")) == 2
    assert capsys.readouterr().err == "error: actor.optimizer: unknown 'lrr'; did you mean 'lr'?\n"


def test_help_explains_modes_and_restarts():
    script = Path(on_policy_distillation.__file__)
    told = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
    assert "goes\non from its newest checkpoint" in told
    assert all(f"  {mode} " in told for mode in MODES)


def test_the_demo_runs_modes_side_by_side_and_does_not_repeat_them(small, tmp_path, capfd):
    arguments = ["--modes", "distill,grpo", *small("total_train_steps=2")[3:]]
    assert demo.main(arguments) == 0
    told = capfd.readouterr()
    assert "reward_curve.png, after" in told.out
    assert "one seed. README.md has the means of five seeds: make demo ARGS" in told.out
    assert "distill" in told.err
    experiment = tmp_path / "test"
    assert is_drawn(experiment / "reward_curve.png")
    assert table(experiment) in told.out
    assert is_drawn(draw(experiment))


def test_the_demo_averages_seeds(small, tmp_path, capfd):
    arguments = ["--modes", "kdrl-full", "--seeds", "1,2", *small("total_train_steps=2")[3:]]
    assert demo.main(arguments) == 0
    told = capfd.readouterr().out
    assert all(f"\nkdrl-full-{seed} " in told for seed in (1, 2))
    assert "one seed" not in told
    assert {trial.name for trial in read_trials(tmp_path / "test")} == {"kdrl-full-1", "kdrl-full-2"}
    assert is_drawn(tmp_path / "test" / "reward_curve.png")


def test_labels_that_would_lie_on_each_other_move_up():
    assert apart([0.1, 0.11, 0.5], 0.06) == pytest.approx([0.1, 0.16, 0.5])
    assert apart([], 0.06) == []


def test_the_figures_of_the_pages_are_those_of_the_committed_run():
    ends: dict[str, list[float]] = {}
    lines = (DOCS / "reward_curve.csv").read_text().splitlines()[1:]
    for mode, update, accuracy in (line.split(",")[1:] for line in lines):
        if update == "200":
            ends.setdefault(mode, []).append(float(accuracy))
    assert {len(seeds) for seeds in ends.values()} == {5}
    page = (DOCS / "on-policy-distillation-example.md").read_text()
    for mode, seeds in ends.items():
        mean, error = fmean(seeds), stdev(seeds) / 5**0.5
        cells = " | ".join(f"{x:.3f}" for x in seeds)
        assert f"| `{mode}` | {cells} | {mean:.3f} ± {error:.3f} |" in page
    readme = (DOCS.parent / "README.md").read_text()
    assert all(f"{fmean(ends[mode]):.2f}" in readme for mode in ("distill", "kdrl", "kdrl-full"))
    assert min(ends["kdrl"]) > 0.15 + max(*ends["distill"], *ends["grpo"])


def test_the_demo_names_a_mode_that_it_does_not_know(capsys):
    assert demo.main(["--modes", "distill,kdlr"]) == 2
    assert capsys.readouterr().err == "error: mode: unknown 'kdlr'; did you mean 'kdrl'?\n"


def test_the_demo_shows_why_a_run_failed(small, capfd):
    arguments = [*small("actor.path=./nowhere")[3:], "--modes=grpo"]
    assert demo.main(arguments) == 1
    told = capfd.readouterr().err
    assert "grpo failed:" in told
    assert "nowhere" in told
