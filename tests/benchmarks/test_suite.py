"""Holds the rules of the benchmark suite: wrong peers are found, paired medians are right, reports say what ran."""

# ruff: noqa: RUF001  (the reports contain the sign ×)

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    __main__ as command,
    bars,
    machine,
    parity,
    peers,
    processes,
    report,
    results,
    suite,
    timing,
    truth,
)
from benchmarks.cases import CPU_GRIDS, GRIDS, MIN_TOKENS, Case, fitted, grid_of, matching
from benchmarks.contenders import Contender, Run
from benchmarks.paths import PATHS
from benchmarks.progress import Progress
from benchmarks.spread import Spread, paired_ratio, spread

ROOT = Path(__file__).parents[2]
CEILINGS = {"copy": 1e10, "matmul bfloat16": 1e11, "matmul float32": 5e10}

# one per path, and both dtypes where they are computed differently; small enough for a float64 truth
SMALL_CASES = [
    Case("logits", 40, 300, dtype="float32"),
    Case("logits", 40, 300, entropy=True),
    Case("hidden", 40, 300, 32, dtype="float32", entropy=True),
    Case("hidden", 40, 300, 32),
    Case("fractions", 40, 300, 32),
    Case("ce", 40, 300, 32, dtype="float32"),
    Case("fused", 40, 300, 32),
    Case("tail", 40, 300),
    Case("jsd", 40, 300, 32, 48, dtype="float32"),
    Case("forward-kl", 40, 300, 32, 48, dtype="float32"),
    Case("reverse-kl", 40, 300, 32, 48, dtype="float32"),
    Case("topk-forward-kl", 40, 300, dtype="float32", kept=7),
]


def runs_of(case: Case) -> dict[str, Run]:
    """Every available eager contender of plain torch and of this library."""
    path = PATHS[case.path]
    problem = path.problem(case, "cpu", True)
    entrants = path.contenders(case, "cpu", {})
    plain = [c for c in entrants if not c.compiled and (c.ours or c.name.startswith("naive"))]
    return {c.name: Run(c, c.build(), problem[c.variant]) for c in plain}


def held(run: Run) -> parity.Parity:
    arguments, leaves = run.fresh_arguments()
    outputs = run.forward(arguments)
    return parity.check(run, outputs, run.backward(outputs, leaves))


# --- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_ours_and_plain_torch_agree_with_the_truth(case):
    runs = runs_of(case)
    assert runs
    for name, run in runs.items():
        found = held(run)
        assert found.passed, f"{name}: {found.complaint}"
        if case.dtype == "float32":
            assert found.value_error < 1e-5, name
            assert found.gradient_error < 1e-5, name


class TestWrongPeers:
    """Each is wrong in one way only, and by about a tenth."""

    @pytest.fixture
    def right(self):
        return runs_of(Case("hidden", 40, 300, 32, dtype="float32"))["naive"]

    def wrong(self, right: Run, change) -> parity.Parity:
        function = lambda *arguments: change(right.function(*arguments)[0])  # noqa: E731
        return held(Run(right.contender, function, right.variant))

    def test_the_right_one_passes(self, right):
        assert self.wrong(right, lambda logp: (logp,)).passed

    def test_a_value_that_is_off(self, right):
        found = self.wrong(right, lambda logp: (logp + 0.1,))
        assert not found.passed
        assert found.gradient_error < 1e-5
        assert found.value_error == pytest.approx(0.1, rel=1e-3)
        assert "value error 1.00e-01" in found.complaint

    def test_a_gradient_that_is_off(self, right):
        found = self.wrong(right, lambda logp: (1.1 * logp - 0.1 * logp.detach(),))
        assert not found.passed
        assert found.value_error < 1e-5
        assert found.gradient_error == pytest.approx(0.1, rel=1e-3)

    def test_one_wrong_token_of_forty(self, right):
        places = torch.arange(40) == 17
        assert not self.wrong(right, lambda logp: (torch.where(places, logp.detach(), logp),)).passed

    def test_a_peer_that_takes_the_incoming_gradient_for_ones(self, right):
        upstream = right.variant.upstream[0]
        assert not self.wrong(right, lambda logp: (logp / upstream + (logp - logp / upstream).detach(),)).passed

    def test_nan_is_an_error_without_bound(self, right):
        assert self.wrong(right, lambda logp: (logp * torch.nan,)).value_error == float("inf")

    def test_another_shape_raises(self, right):
        logp = right.forward(right.variant.arguments)[0]
        with pytest.raises(ValueError, match=r"output is \(40, 1\), expected \(40,\)"):
            parity.check(right, (logp[:, None],), right.backward((logp,), right.variant.leaves))

    def test_bf16_rounding_is_excused_in_a_peer_and_not_in_ours(self):
        runs = runs_of(Case("logits", 40, 300))
        rounded = lambda logits, labels: (peers.naive_logits(logits, labels)[0].bfloat16(),)  # noqa: E731
        as_peer = held(Run(runs["naive"].contender, rounded, runs["naive"].variant))
        as_ours = held(Run(runs["kdloss"].contender, rounded, runs["kdloss"].variant))
        assert as_peer.passed
        assert as_peer.value_error > 1e-3
        assert not as_ours.passed


def test_ours_may_err_as_much_as_plain_torch_and_no_more():
    run = runs_of(Case("hidden", 40, 300, 32))["kdloss"]
    outputs = run.forward(run.variant.arguments)
    gradients = run.backward(outputs, run.variant.leaves)
    off = tuple(1.02 * g.float() for g in gradients)
    assert not parity.check(run, outputs, off).passed
    plain = parity.Parity(1e-3, 0.03, 0.15, 0.06, 0.0)
    assert parity.check(run, outputs, off, plain=plain).passed
    assert not parity.check(run, outputs, off, plain=replace(plain, gradient_error=0.07)).passed  # itself wrong


def test_labels_and_mask_of_a_peer_say_the_same():
    for fraction, variant in PATHS["fractions"].problem(Case("fractions", 50, 300, 32), "cpu", False).items():
        _, _, labels, mask = variant.arguments
        assert torch.equal(labels == -100, ~mask)
        assert mask.sum() == round(float(fraction) * 50)


def test_a_contender_that_overwrites_gets_a_copy():
    variant = PATHS["logits"].problem(Case("logits", 4, 30, dtype="float32"), "cpu", False)[""]
    run = Run(Contender("x", peers.naive_logits, overwrites=True), peers.naive_logits, variant)
    before = variant.arguments[0].detach().clone()
    arguments, leaves = run.fresh_arguments()
    assert leaves == (arguments[0],)
    arguments[0].detach().zero_()
    assert torch.equal(variant.arguments[0], before)


def test_an_absent_peer_says_why():
    with pytest.raises(peers.AbsentError, match="no_such_package is not installed"):
        peers.load("no_such_package", "f")
    with pytest.raises(peers.AbsentError, match="torch has no no_such_name in this version"):
        peers.load("torch", "no_such_name")
    absent: dict[str, str] = {}
    PATHS["ce"].contenders(Case("ce", 4, 30, 8), "cpu", absent)
    assert absent["CCE"] == "needs a GPU"


# --- the arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_medians_and_quartiles_are_numpys(count):
    samples = list(np.random.default_rng(count).random(count))
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
    assert spread(samples) == pytest.approx((median, low, high, count), rel=1e-12)


def test_a_ratio_is_taken_within_each_round():
    # the machine slows down by 10 in the middle: every pair still gives 2, the medians do not
    slow, fast = [2.0, 20.0, 2.0, 20.0], [1.0, 10.0, 1.0, 10.0]
    assert paired_ratio(slow, fast) == Spread(2.0, 2.0, 2.0, 4)
    assert statistics.median([2.0, 20.0, 2.0]) / statistics.median([10.0, 1.0, 10.0]) != 2
    with pytest.raises(ValueError, match="3 and 4 samples are no pairs"):
        paired_ratio([1, 2, 3], fast)
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_contenders_take_turns_and_everyone_runs_in_every_round(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(timing, "one_sample", lambda run, device, repeats: timing.Sample(0.5, 1.0, 0.25, 0.0))
    taken = timing.interleave(dict.fromkeys("abc"), "cpu", seconds=1e9, max_rounds=4, announce=order.append)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # a warm-up, then rounds from a rotating start
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 4, "b": 4, "c": 4}
    rushed = timing.interleave(dict.fromkeys("ab"), "cpu", seconds=0, max_rounds=9)
    assert len(rushed["a"]) == 3  # a median needs at least three


def test_a_sample_holds_the_work_and_not_the_waiting():
    run = runs_of(Case("logits", 256, 4000, dtype="float32"))["naive"]
    sample = timing.one_sample(run, "cpu", 20)
    assert 0 < sample.forward < sample.total
    assert sample.user > 0


def test_the_floor_counts_bytes_from_logits_and_products_from_hidden_states():
    logits = Case("logits", 8192, 151936)
    assert logits.floor_seconds(CEILINGS) == 3 * 8192 * 151936 * 2 / 1e10
    hidden = Case("hidden", 8192, 151936, 1024)
    assert hidden.floor_seconds(CEILINGS) == 3 * 2 * 8192 * 151936 * 1024 / 1e11
    divergence = Case("jsd", 8192, 151936, 1024, 4096)
    assert divergence.floor_seconds(CEILINGS) == pytest.approx(7 / 3 * hidden.floor_seconds(CEILINGS))


def test_a_case_shrinks_until_it_fits_in_memory_and_in_time():
    case = Case("logits", 32768, 151936)
    roomy = {"ceilings": CEILINGS, "gpu": False, "call_seconds": 1e9}
    assert fitted(case, free_bytes=10**12, **roomy) == case
    tight = fitted(case, free_bytes=8 * 2**30, **roomy)
    assert tight.least_bytes <= 0.8 * 8 * 2**30
    assert replace(tight, tokens=2 * tight.tokens).least_bytes > 0.8 * 8 * 2**30
    assert fitted(case, free_bytes=1, **roomy).tokens == MIN_TOKENS
    assert fitted(case, free_bytes=10**12, **{**roomy, "call_seconds": 1.0}).tokens < 2048


def test_the_core_grid_has_twelve_points_and_every_bar_has_its_path():
    assert len(GRIDS["core"].cases) == len(CPU_GRIDS["core"].cases) == 12
    assert grid_of("core", "cpu") is CPU_GRIDS["core"]
    assert grid_of("quick", "cpu") is grid_of("quick", "cuda") is GRIDS["quick"]
    for grid in [*GRIDS.values(), *CPU_GRIDS.values()]:
        assert {"logits", "hidden", "fractions", "fused", "tail"} <= {case.path for case in grid.cases}
        assert {case.path for case in grid.cases} <= set(PATHS)
        assert len({case.name for case in grid.cases}) == len(grid.cases)


def test_samples_of_rows_are_distinct_and_hold_both_ends():
    for size in (1, 2, 64, 65, 1000):
        rows = truth.sample(size, torch.device("cpu"))
        assert len(rows.unique()) == len(rows) == min(size, 64)
        assert rows[0] == 0
        assert rows[-1] == size - 1


# --- the report ----------------------------------------------------------------------------------------------------


def row(user: float, *, ours: bool, extra: float | None = None, **more) -> dict:
    """Three rounds: forward takes a third, wall time includes system time, the last round is slower by 2."""
    samples = [
        {"forward": user * x / 3, "total": 2 * user * x, "user": user * x, "system": user * x} for x in (1, 1, 2)
    ]
    base = {"ours": ours, "compiled": False, "scale": 1.0, "work": 1.0, "error": "", "first_seconds": 1.0}
    found = {**base, "samples": samples, "parity": {"value_error": 1e-6, "gradient_error": 2e-6}, **more}
    return found if extra is None else {**found, "extra_bytes": extra * 1e6}


def entry(case: Case, rows: dict, reference: str, **more) -> dict:
    base = {"case": case.__dict__, "name": case.name, "logits_bytes": 1e6, "floor_seconds": 0.03, "not_run": ""}
    return {**base, "reference": reference, "rows": rows, "absent": {}, **more}


def stored() -> dict:
    wrong = row(0.1, ours=False, error="value error 1.0e+00 (bound 1.5e-01)")
    del wrong["samples"]
    logits = {
        "kdloss": row(0.1, ours=True, extra=1.05),
        "kdloss compiled": row(0.08, ours=True, compiled=True),
        "naive": row(0.12, ours=False, extra=6),
        "a wrong peer": wrong,
    }
    fractions = {"kdloss 1": row(1.0, ours=True), "kdloss 0.3": row(0.35, ours=True, work=0.3)}
    tail = {"kdrl_loss": row(0.004, ours=True, work=0.0), "gather": row(0.1, ours=True, work=0.0, scale=16.0)}
    absent = {"absent": {"TRL": "trl is not installed"}}
    return {
        "format": 1,
        "grid": "core",
        "kind": "cpu",
        "slug": "a-cpu",
        "facts": {"device": "A CPU", "torch": "2.13.0", "triton": "absent", "date": "2026-01-01", "threads": "1"},
        "ceilings": CEILINGS,
        "cases": [
            entry(Case("logits", 2048, 151936), logits, "naive", **absent),
            entry(Case("fractions", 512, 32000, 256), fractions, "kdloss 1"),
            entry(Case("tail", 2048, 151936), tail, "gather"),
            entry(Case("fused", 512, 32000, 256), {}, "kdloss two-step", not_run="kdloss has no fused_linear_loss yet"),
        ],
    }


def test_bars_are_read_off_the_paired_samples():
    found = {bar.what: bar for bar in bars.bars(stored())}
    eager = found["logits V=151936 bfloat16, eager, beside naive"]
    assert eager[1:] == ("≥ 1.1× speed", "1.20× [1.20×, 1.20×], 3 rounds", "yes", "logits-T2048-V151936-bfloat16")
    compiled = found["logits V=151936 bfloat16, torch.compile, beside naive"]
    assert (compiled.measured, compiled.met) == ("1.50× [1.50×, 1.50×], 3 rounds", "no")
    memory_bar = found["logits V=151936 bfloat16, extra memory"]
    assert (memory_bar.measured, memory_bar.met) == ("1.05×", "yes")
    trained = found["30 % of tokens trained, time of all"]
    assert (trained.bar, trained.measured.split(" [")[0], trained.met) == ("≤ 40% of its time", "35.00%", "yes")
    tail = found["kdrl_loss, T=32768, eager, time of the gather"]
    assert (tail.measured.split(" [")[0], tail.met) == ("0.25%", "yes")  # 0.004 of 16 * 0.1
    missing = [bar.what for bar in bars.bars(stored()) if bar.met == "not measured"]
    assert "logits V=151936 bfloat16, eager, beside TRL" in missing
    assert "fused_linear_loss beside two steps" in missing
    assert all(bar.measured == "" for bar in bars.bars(stored()) if bar.met == "not measured")


def test_the_bars_of_a_gpu_are_shares_of_its_ceiling():
    result = {**stored(), "kind": "cuda"}
    result["cases"][0]["case"] = Case("logits", 8192, 151936).__dict__
    found = {bar.what: bar for bar in bars.bars(result)}
    # a third of the floor of 30 ms in 33 ms; two thirds of it in 167 ms
    assert found["logits → logp, forward"].measured == "30%"
    assert found["logits → logp, backward"].measured == "12%"
    assert found["hidden → logp, D=4096"].met == "not measured"


def test_a_share_is_of_the_work_that_a_contender_has():
    fractions = stored()["cases"][1]
    assert results.share(fractions, "kdloss 1") == pytest.approx(0.03 / 2)
    assert results.share(fractions, "kdloss 0.3") == pytest.approx(0.3 * 0.03 / 0.7)
    assert results.share(stored()["cases"][2], "gather") is None


def test_a_report_is_laid_out_again_from_a_stored_json(tmp_path, capsys):
    (tmp_path / "core.json").write_text(json.dumps(stored()), encoding="utf-8")
    assert command.main(["--report", str(tmp_path / "core.json")]) == 0
    text = (tmp_path / "core.md").read_text(encoding="utf-8")
    for line in (
        "# A CPU, `core` grid",
        "| logits V=151936 bfloat16, eager, beside naive | ≥ 1.1× speed | 1.20× [1.20×, 1.20×], 3 rounds | yes |",
        "| `logits-T2048-V151936-bfloat16` | a wrong peer | value error 1.0e+00 (bound 1.5e-01) |",
        "| naive | 240 [240, 360] | 40.00 [40.00, 60.00] | 120 [120, 180] | 1 | 12% | 6.00× | 1.0e-06 | 2.0e-06 |  |",
        "gather: measured on fewer tokens, times 16.",
        "- TRL (logits): trl is not installed",
        "- `fused-T512-V32000-D256-bfloat16`: not run (kdloss has no fused_linear_loss yet)",
    ):
        assert line in text, line
    assert text.count("a wrong peer") == 1  # but in no table of times
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    listed = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(listed) == pictures
    if pictures:
        assert pictures == ["core-fractions.png", "core-logits.png", "core-tail.png"]


def test_without_matplotlib_the_rest_is_still_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = report.write(stored(), tmp_path, "core")
    assert [path.suffix for path in written] == [".json", ".md"]
    assert "pip install matplotlib" in capsys.readouterr().err


def test_without_tqdm_a_line_a_step(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with Progress() as progress:
        progress.begin(2)
        progress.step("logits")
        progress.note("naive")
    said = capsys.readouterr().err
    assert "pip install tqdm" in said
    assert "logits" in said


def test_a_folder_name_holds_no_path_and_no_message_does():
    assert processes.without_paths("OSError: /home/me/a-b/lib.so: not found") == "OSError: lib.so: not found"
    assert processes.without_paths("1/2 of the tokens, and/or more") == "1/2 of the tokens, and/or more"
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert machine.slug("../../etc") == "etc"


# --- the run -------------------------------------------------------------------------------------------------------


def a_suite(cases: list[Case], **more) -> suite.Suite:
    grid = replace(GRIDS["quick"], cases=cases, **more)
    return suite.Suite("quick", grid, cases, "cpu", 1, lambda result: None, Progress())


MACHINE = {"facts": {}, "slug": "a-cpu", "free_bytes": 10**12, "ceilings": CEILINGS}


def test_a_peer_that_kills_the_process_is_left_out_of_a_second_try(monkeypatch):
    jobs = []

    def run_job(job, **options):
        jobs.append(job)
        if job["kind"] == "machine":
            return MACHINE
        if job["kind"] == "case" and not job["exclude"]:
            raise processes.WorkerError("ended with code -11", at="TRL")
        return {"rows": {"kdloss": {"ours": True, "error": ""}}, "absent": {}, "reference": "naive"}

    monkeypatch.setattr(suite, "run_job", run_job)
    result = a_suite([Case("logits", 64, 300)])()
    assert [job.get("exclude") for job in jobs if job["kind"] == "case"] == [[], ["TRL"]]
    assert result["cases"][0]["not_run"] == ""
    assert list(result["cases"][0]["rows"]) == ["kdloss"]


@pytest.mark.parametrize("at", ["kdloss compiled", "gather", None])
def test_a_death_that_is_no_peers_ends_the_run(monkeypatch, at):
    def run_job(job, **options):
        if job["kind"] == "machine":
            return MACHINE
        raise processes.WorkerError("ended with code -9", at=at)

    monkeypatch.setattr(suite, "run_job", run_job)
    with pytest.raises(suite.OursWrongError, match="died: ended with code -9"):
        a_suite([Case("logits", 64, 300)])()


def test_ours_failing_ends_the_run(monkeypatch, capsys, tmp_path):
    def run_job(job, **options):
        if job["kind"] == "machine":
            return {**MACHINE, "facts": stored()["facts"]}
        wrong = row(0.1, ours=True, error="value error 1.00e+00 (bound 1.00e-03)")
        return {"rows": {"kdloss": wrong}, "absent": {}, "reference": "naive"}

    monkeypatch.setattr(suite, "run_job", run_job)
    code = command.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    assert code == 1
    assert "kdloss fails parity: value error 1.00e+00" in capsys.readouterr().err
    stored_cases = json.loads((tmp_path / "a-cpu" / "quick.json").read_text(encoding="utf-8"))["cases"]
    assert len(stored_cases) == 1  # no case ran after it


def test_what_no_longer_fits_the_time_is_listed(monkeypatch):
    monkeypatch.setattr(suite, "run_job", lambda job, **options: dict(MACHINE))
    result = a_suite([Case("logits", 64, 300)], seconds=0)()
    assert result["cases"][0]["not_run"] == "the 0 s of the grid were over"


@pytest.mark.parametrize(
    ("pattern", "text"), [("nothing-like-it", "matches none of these cases:"), ("(", "is no regular expression")]
)
def test_a_bad_pattern_is_an_error_of_the_command_line(pattern, text, capsys):
    assert command.main(["--quick", "--only", pattern]) == 2
    assert text in capsys.readouterr().err


def test_a_pattern_picks_cases_by_name(capsys):
    for device, tokens in (("cuda", 8192), ("cpu", 4096)):
        assert command.main(["--core", "--only", "^logits-.*V32000", "--list", "--device", device]) == 0
        assert capsys.readouterr().out.split() == [f"logits-T{tokens}-V32000-float32"]
    assert matching(GRIDS["core"].cases, None) == GRIDS["core"].cases


def test_a_small_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Real processes: ceilings, one case, memory of two contenders. 16 MB of logits, to exceed the noise."""
    cases = [Case("logits", 128, 32000, dtype="float32", compiled=False)]
    monkeypatch.setitem(GRIDS, "quick", replace(GRIDS["quick"], cases=cases, seconds=600, sample_seconds=0.3))
    assert command.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "quick.json").read_text(encoding="utf-8"))
    (ran,) = result["cases"]
    assert {"kdloss", "naive", "naive split"} <= set(ran["rows"])
    assert results.ratio(ran, "naive", "naive split", "user").rounds >= 3
    # a float32 softmax of the logits, and a gradient of each of the two: the formula needs at least 2
    assert 1.9 < results.extra_memory(ran, "naive") < 4
    assert results.extra_memory(ran, "kdloss") > 0.9  # the gradient
    text = (folder / "quick.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in text
    assert str(ROOT) not in text
    assert "ceiling" in text


def test_the_parent_needs_no_torch():
    """Every child would inherit the peak memory of a parent that imports torch."""
    code = "import sys, benchmarks.__main__; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_the_last_words_of_a_process_that_dies_are_reported():
    with pytest.raises(processes.WorkerError, match="KeyError: 'no such job'"):
        processes.run_job({"kind": "no such job", "device": "cpu", "threads": 1}, timeout=60)
