"""Holds the rules of the benchmarks: wrong peers are found, ratios are paired, reports say what ran and what lost."""

# ruff: noqa: RUF001  (the reports contain the sign ×)

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command, peers, report, timing, worker
from benchmarks.cases import CORE_CPU, GRIDS, MIN_TOKENS, Case, fitted, matching
from benchmarks.formulas import OURS, mean_of
from benchmarks.peers import Contender
from benchmarks.problems import CHUNK_ELEMENTS, Parity, build, check, sample
from benchmarks.timing import Run

ROOT = Path(__file__).parents[2]
CEILINGS = {"copy": 1e10, "matmul bfloat16": 1e11, "matmul float32": 5e10}

# one per path, and both dtypes where they are computed differently; logits of more than one chunk in one of them
SMALL_CASES = [
    Case("logits", 40, 300, dtype="float32"),
    Case("logits", 40, 300, entropy=True),
    Case("hidden", 40, 300, 32, dtype="float32", entropy=True),
    Case("hidden", 40, 300, 32, trained=0.3),
    Case("ce", 40, 300, 32, dtype="float32"),
    Case("kdrl", 40, 300, 32),
    Case("grpo", 40, 300, 32, dtype="float32"),
    Case("tail", 40, 300),
    *(Case(kind, 40, 300, dtype="float32") for kind in ("jsd", "forward-kl", "reverse-kl")),
    *(Case(f"linear-{kind}", 40, 300, 32, 48, dtype="float32") for kind in ("jsd", "forward-kl", "reverse-kl")),
    Case("topk-forward-kl", 40, 300, dtype="float32", kept=7),
    Case("linear-topk-forward-kl", 40, 300, 32, dtype="float32", kept=7),
]


def runs_of(case: Case) -> dict[str, Run]:
    """Plain torch and this library, eager."""
    inputs = build(case, "cpu")[key := "tail" if case.path == "tail" else ""]
    naive = mean_of(inputs.formula) if inputs.scalar else inputs.formula
    found = {"naive": Run(Contender("naive", naive, inputs=key), inputs)}
    for name, function in OURS[case.path](case).items():
        found[name] = Run(Contender(name, function, ours=True, inputs=key), inputs)
    return found


def held(run: Run, case: Case, **more) -> Parity:
    outputs = run.forward(run.inputs.arguments)
    gradients = run.backward(outputs, run.inputs.arguments)
    return check(run.inputs.truth(case.vocab), outputs, gradients, ours=run.contender.ours, **more)


# --- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_ours_and_plain_torch_agree_with_the_truth(case, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 17 * case.vocab)
    for name, run in runs_of(case).items():
        found = held(run, case)
        assert not found.complaint, name
        if case.dtype == "float32":
            assert found.value_error < 1e-5, name
            assert found.gradient_error < 1e-5, name


class TestWrongPeers:
    """Each is wrong in one way only, and by about a tenth."""

    CASE = Case("hidden", 40, 300, 32, dtype="float32")

    @pytest.fixture
    def right(self):
        return runs_of(self.CASE)["naive"]

    def wrong(self, right: Run, change) -> Parity:
        function = lambda *arguments: change(right.contender.function(*arguments)[0])  # noqa: E731
        return held(Run(Contender("wrong", function), right.inputs), self.CASE)

    def test_the_right_one_passes(self, right):
        assert not self.wrong(right, lambda logp: (logp,)).complaint

    def test_a_value_that_is_off(self, right):
        found = self.wrong(right, lambda logp: (logp + 0.1,))
        assert found.gradient_error < 1e-5
        assert found.value_error == pytest.approx(0.1, rel=1e-3)
        assert "value error 1.00e-01" in found.complaint

    def test_a_gradient_that_is_off(self, right):
        found = self.wrong(right, lambda logp: (1.1 * logp - 0.1 * logp.detach(),))
        assert found.complaint
        assert found.value_error < 1e-5
        assert found.gradient_error == pytest.approx(0.1, rel=1e-3)

    def test_one_wrong_token_of_forty(self, right):
        places = torch.arange(40) == 17
        assert self.wrong(right, lambda logp: (torch.where(places, logp.detach(), logp),)).complaint

    def test_a_peer_that_takes_the_incoming_gradient_for_ones(self, right):
        upstream = right.inputs.upstream[0]
        assert self.wrong(right, lambda logp: (logp / upstream + (logp - logp / upstream).detach(),)).complaint

    def test_nan_is_an_error_without_bound(self, right):
        assert self.wrong(right, lambda logp: (logp * torch.nan,)).value_error == float("inf")

    def test_another_shape_raises(self, right):
        logp = right.forward(right.inputs.arguments)[0]
        gradients = right.backward((logp,), right.inputs.arguments)
        with pytest.raises(ValueError, match=r"output is \(40, 1\), expected \(40,\)"):
            check(right.inputs.truth(300), (logp[:, None],), gradients, ours=False)

    def test_bf16_rounding_is_excused_in_a_peer_and_not_in_ours(self):
        case = Case("logits", 40, 300)
        naive = runs_of(case)["naive"]
        rounded = lambda logits, labels: (naive.contender.function(logits, labels)[0].bfloat16(),)  # noqa: E731
        as_peer = held(Run(Contender("x", rounded), naive.inputs), case)
        assert not as_peer.complaint
        assert as_peer.value_error > 1e-3
        assert held(Run(Contender("x", rounded, ours=True), naive.inputs), case).complaint


def test_ours_may_err_as_much_as_plain_torch_and_no_more():
    case = Case("hidden", 40, 300, 32)
    run = runs_of(case)["kdloss"]
    outputs = run.forward(run.inputs.arguments)
    off = tuple(1.02 * g.float() for g in run.backward(outputs, run.inputs.arguments))
    truth = run.inputs.truth(case.vocab)
    rounded = tuple(g.bfloat16() for g in off)
    assert check(truth, outputs, rounded, ours=True).complaint
    plain = Parity(1e-3, 0.03, 0.3, 0.06)
    assert not check(truth, outputs, rounded, ours=True, plain=plain).complaint
    assert check(
        truth, outputs, rounded, ours=True, plain=plain._replace(gradient_error=0.07)
    ).complaint  # wrong itself


def test_labels_and_mask_of_a_peer_say_the_same():
    _, _, labels, mask = build(Case("hidden", 50, 300, 32, trained=0.3), "cpu")[""].arguments
    assert torch.equal(labels == -100, ~mask)
    assert mask.sum() == 15


def test_ratios_stay_away_from_the_clips_and_advantages_belong_to_sequences():
    inputs = build(Case("grpo", 512, 100, 16), "cpu")[""]
    *_, old_logp, _, advantages = inputs.arguments
    (logp,) = build(Case("hidden", 512, 100, 16), "cpu")[""].formula(*inputs.arguments[:4])
    assert (logp - old_logp).exp().sub(1).abs().max() < 0.15
    assert [len(x.unique()) for x in advantages.split(256)] == [1, 1]


def test_a_contender_that_overwrites_gets_a_copy():
    run = runs_of(Case("logits", 4, 30, dtype="float32"))["naive"]
    run = Run(replace(run.contender, overwrites=True), run.inputs)
    before = run.inputs.arguments[0].detach().clone()
    first, *_ = run.fresh_arguments()
    assert first.requires_grad
    first.detach().zero_()
    assert torch.equal(run.inputs.arguments[0], before)


def test_an_absent_peer_says_why():
    with pytest.raises(peers.AbsentError, match="no_such_package is not installed"):
        peers.load("no_such_package", "f")
    with pytest.raises(peers.AbsentError, match="torch has no no_such_name in this version"):
        peers.load("torch", "no_such_name")
    with pytest.raises(peers.AbsentError, match="its kernels need a GPU"):
        peers.on_gpu("cpu", "torch", "Tensor")


def test_samples_of_rows_are_distinct_and_hold_both_ends():
    for size in (1, 2, 64, 65, 1000):
        rows = sample(size)
        assert len(rows.unique()) == len(rows) == min(size, 64)
        assert rows[0] == 0
        assert rows[-1] == size - 1


# --- the arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_medians_and_quartiles(count):
    samples = list(np.random.default_rng(count).random(count))
    found = report.spread(samples)
    assert found.median == pytest.approx(statistics.median(samples), rel=1e-12)
    if count > 1:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
        assert (found.low, found.median, found.high) == pytest.approx(quartiles, rel=1e-12)


def test_a_ratio_is_taken_within_each_round():
    # the machine slows down by 10 in the middle: every pair still gives 2, the medians do not
    slow, fast = [2.0, 20.0, 2.0], [1.0, 10.0, 10.0]
    rows = {name: {"samples": [{"user": x} for x in xs]} for name, xs in {"a": slow, "b": fast}.items()}
    assert report.ratio({"rows": rows}, "a", "b", "user").median == 2
    assert statistics.median(slow) / statistics.median(fast) != 2
    assert report.ratio({"rows": rows}, "a", "absent", "user") is None


def test_contenders_take_turns_and_everyone_runs_in_every_round(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(timing, "one_sample", lambda run, device, repeats: {"total": 1.0})
    limits = {"seconds": 1e9, "min_rounds": 3, "max_rounds": 4}
    taken = timing.interleave(dict.fromkeys("abc"), "cpu", announce=order.append, **limits)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # a warm-up, then rounds from a rotating start
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 4, "b": 4, "c": 4}
    rushed = timing.interleave(dict.fromkeys("ab"), "cpu", **{**limits, "seconds": -1.0})
    assert len(rushed["a"]) == 3
    assert timing.interleave({}, "cpu", **limits) == {}


def test_a_sample_holds_forward_and_total():
    run = runs_of(Case("logits", 64, 1000, dtype="float32"))["naive"]
    found = timing.one_sample(run, "cpu", 20)
    assert 0 < found["forward"] < found["total"]
    assert found["user"] > 0


def test_the_floor_counts_bytes_from_logits_and_products_of_trained_tokens_from_hidden_states():
    assert Case("logits", 8192, 151936).floor_seconds(CEILINGS) == 3 * 8192 * 151936 * 2 / 1e10
    hidden = Case("hidden", 8192, 151936, 1024)
    assert hidden.floor_seconds(CEILINGS) == 3 * 2 * 8192 * 151936 * 1024 / 1e11
    assert replace(hidden, trained=0.5).floor_seconds(CEILINGS) == hidden.floor_seconds(CEILINGS) / 2
    divergence = Case("linear-jsd", 8192, 151936, 1024, 4096)
    assert divergence.floor_seconds(CEILINGS) == pytest.approx(7 / 3 * hidden.floor_seconds(CEILINGS))


def test_a_case_shrinks_until_it_fits_in_memory():
    case = Case("logits", 32768, 151936)
    assert fitted(case, 10**12) == case
    assert fitted(case, 8 * 2**30).tokens == 2048  # whose logits of 0.6 GiB count ten times
    assert fitted(case, 1).tokens == MIN_TOKENS


def test_every_grid_has_every_kind_of_path_and_no_case_twice():
    for grid in GRIDS.values():
        paths = {case.path for case in grid.cases}
        assert {"logits", "hidden", "kdrl", "grpo", "ce", "tail", "topk-forward-kl"} <= paths <= set(OURS)
        assert any(case.trained < 1 for case in grid.cases)
        assert len({case.name for case in grid.cases}) == len(grid.cases)


# --- the report ----------------------------------------------------------------------------------------------------


def row(user: float, *, ours: bool = False, extra: float | None = None, **more) -> dict:
    """Three rounds: the forward takes a third, wall time includes system time, the last round takes twice as long."""
    samples = [{"forward": user * x / 3, "total": 2 * user * x, "user": user * x, "system": 0} for x in (1, 1, 2)]
    base = {"ours": ours, "compiles": False, "error": "", "first_seconds": 1.0, "value_error": 1e-6}
    found = {**base, "gradient_error": 2e-6, "samples": samples, **more}
    return found if extra is None else {**found, "extra_bytes": extra * 2**20}


def entry(case: Case, rows: dict, **more) -> dict:
    base = {"case": vars(case), "name": case.name, "logits_bytes": 2**20, "floor_seconds": 0.03}
    return {**base, "rows": rows, "absent": {}, **more}


def stored() -> dict:
    wrong = {"ours": False, "compiles": False, "error": "value error 1.0e+00 (bound 3.0e-01)"}
    logits = {
        "naive": row(0.12, extra=6),
        "kdloss": row(0.1, ours=True, extra=1.05),
        "kdloss compiled": row(0.08, ours=True, compiles=True),
        "TRL": row(0.09, extra=0.5),
        "CCE": wrong,
    }
    tail = {"naive": row(0.002), "kdloss": row(0.004, ours=True), "gather": row(0.1, ours=True)}
    absent = {"absent": {"Liger kernel": "its kernels need a GPU"}}
    packages = dict.fromkeys(("trl", "liger-kernel", "cut-cross-entropy"), "1.0")
    return {
        "grid": "core",
        "kind": "cpu",
        "slug": "a-cpu",
        "facts": {"device": "A CPU", "torch": "2.13.0", **packages, "date": "2026-01-01", "threads": "1"},
        "ceilings": CEILINGS,
        "cases": [entry(Case("logits", 2048, 151936), logits, **absent), entry(Case("tail", 2048, 151936), tail)],
        "not_run": {"hidden-T1-V2-D3-bfloat16": "the time of the grid was over"},
        "failed": "",
    }


def test_a_stored_result_is_laid_out_again(tmp_path, capsys):
    (tmp_path / "core.json").write_text(json.dumps(stored()), encoding="utf-8")
    assert command.main(["--report", str(tmp_path / "core.json")]) == 0
    text = capsys.readouterr().out
    for line in (
        "# A CPU, `core` grid",
        "Logits 1 MiB. CCE: not timed, value error 1.0e+00 (bound 3.0e-01).",
        "| naive | 120.00 [120.00, 180.00] | 240.00 [240.00, 360.00] | 40.00 [40.00, 60.00] | 1.00 [1.00, 1.00] "
        "| 12% | 6.00× | 1.0e-06 | 2.0e-06 |  |",
        "- Liger kernel (logits): its kernels need a GPU",
        "- `hidden-T1-V2-D3-bfloat16`: not run, the time of the grid was over",
    ):
        assert line in text, line
    assert [path.name for path in tmp_path.iterdir()] == ["core.json"]


def test_the_summary_shows_losses_in_bold():
    lines = report.summary(stored()).splitlines()
    assert lines[0] == "A CPU, 1 thread; torch 2.13.0, trl 1.0, liger-kernel 1.0, cut-cross-entropy 1.0; 2026-01-01."
    assert lines[2] == "| case | kdloss: user CPU ms, MiB | naive | TRL | CCE |"
    assert lines[4] == "| `logits-T2048-V151936-bf16` | 100, 1 | 1.20, 5.71 | **0.90**, **0.48** | fails |"
    assert lines[5] == "| `logits-T2048-V151936-bf16`, compiled | 80, ? | 1.50, ? | 1.12, ? | fails |"
    assert lines[6] == "| `tail-T2048-V151936-bf16` | 4, ? | **0.50**, ? |  |  |"
    assert "`tail-T2048-V151936-bfloat16`: `kdrl_loss` takes 4.00% of the time of the log-probs before it." in lines


def test_the_summary_goes_between_the_markers_of_a_page():
    other = "<!-- summary: other.json -->\nother\n<!-- end of summary -->\n"
    page = f"before\n{other}<!-- summary: this.json -->\nold\n<!-- end of summary -->\nafter\n"
    new = report.documented(page, stored(), "this.json")
    summary = report.summary(stored())
    assert new == page.replace("old", f"\n{summary}\n")
    assert report.documented(new, stored(), "this.json") == new
    assert report.documented("no markers", stored(), "this.json") == "no markers"
    name = stored()["cases"][0]["name"]
    few = report.documented(page.replace("this.json", f"this.json {name}"), stored(), "this.json")
    rows = [line for line in few.splitlines() if line.startswith("| `")]
    assert rows == summary.splitlines()[4:6]
    assert "of the time of the log-probs" not in few


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_a_page_holds_the_summaries_of_the_results_that_it_names(page):
    page = (ROOT / page).read_text(encoding="utf-8")
    found = report.SUMMARY.findall(page)
    assert found
    for _, data, *_ in found:
        result = json.loads((ROOT / data).read_text(encoding="utf-8"))
        assert report.documented(page, result, data) == page, f"run: python -m benchmarks --report {data} --save"


def test_the_times_of_a_mask_are_those_of_the_stored_result():
    result = json.loads((ROOT / "benchmarks/results/intel-xeon-2-cores/core.json").read_text(encoding="utf-8"))
    ours = {entry["name"]: entry["rows"]["kdloss"]["samples"] for entry in result["cases"]}
    names = [f"hidden-T1024-V16384-D1024-{part}bfloat16" for part in ("", "trained30%-", "trained10%-")]
    whole, third, tenth = (round(1e3 * statistics.median(x["user"] for x in ours[name])) for name in names)
    page = " ".join((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split())
    assert f"takes {whole} ms, {third} ms with 30 % of the tokens kept, and {tenth} ms with 10 %" in page


def test_a_chart_shows_every_contender(tmp_path):
    pytest.importorskip("matplotlib")
    (drawn,) = report.draw(stored(), tmp_path / "core.png")
    assert drawn.stat().st_size > 10_000


def test_without_matplotlib_the_rest_is_still_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = report.write(stored(), tmp_path, "core")
    assert [path.suffix for path in written] == [".json", ".md"]
    assert "pip install matplotlib" in capsys.readouterr().err


def test_no_name_and_no_message_holds_a_path():
    assert report.without_paths("OSError: /home/me/a-b/lib.so: not found") == "OSError: lib.so: not found"
    assert report.without_paths("1/2 of the tokens, and/or more") == "1/2 of the tokens, and/or more"
    assert worker.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert worker.slug("../../etc") == "etc"


# --- the run -------------------------------------------------------------------------------------------------------

MACHINE = {"facts": stored()["facts"], "slug": "a-cpu", "ceilings": CEILINGS}


def a_suite(cases: list[Case], **more) -> command.Suite:
    grid = replace(GRIDS["core", "cpu"], cases=cases, **more)
    return command.Suite("core", grid, cases, "cpu")


def fake(monkeypatch, measure) -> list[dict]:
    """The jobs that the suite hands out; `measure(case, job)` gives the entry of each case."""
    jobs = []

    def results_of(job, **options):
        jobs.append(job)
        if not job["cases"]:
            yield MACHINE
        for case in job["cases"]:
            yield measure(Case(**case), job)

    monkeypatch.setattr(command, "results_of", results_of)
    return jobs


def test_a_peer_that_kills_the_process_is_left_out_of_a_second_try(monkeypatch):
    def measure(case, job):
        if not job["exclude"] and case.tokens == 64:
            raise command.WorkerError("ended with code -11", at="TRL")
        return entry(case, {"kdloss": row(1, ours=True)})

    jobs = fake(monkeypatch, measure)
    result = a_suite([Case("logits", 64, 300), Case("logits", 32, 300)])()
    assert [job["exclude"] for job in jobs[1:]] == [[], ["TRL"], []]
    assert [x["name"] for x in result["cases"]] == ["logits-T64-V300-bfloat16", "logits-T32-V300-bfloat16"]
    assert not result["failed"]


@pytest.mark.parametrize("at", ["kdloss compiled", "gather", None])
def test_a_death_that_is_no_peers_ends_the_run(monkeypatch, at):
    def measure(case, job):
        raise command.WorkerError("ended with code -9", at=at)

    fake(monkeypatch, measure)
    assert "died: ended with code -9" in a_suite([Case("logits", 64, 300)])()["failed"]


@pytest.mark.parametrize("quick", [False, True])
def test_ours_failing_ends_the_run(monkeypatch, capsys, tmp_path, quick):
    wrong = row(0.1, ours=True, error="value error 1.00e+00 (bound 1.00e-03)")
    fake(monkeypatch, lambda case, job: entry(case, {"kdloss": wrong}))
    monkeypatch.setattr(command, "_renew_pages", lambda *given: pytest.fail("a page shows a run that failed"))
    code = command.main(["--quick" if quick else "--core", "--device", "cpu", "--out", str(tmp_path)])
    assert code == 1
    assert "kdloss: value error 1.00e+00" in capsys.readouterr().err
    (data,) = tmp_path.rglob("*.json")
    assert len(json.loads(data.read_text(encoding="utf-8"))["cases"]) == 1  # no case ran after it


def test_what_no_longer_fits_the_time_is_listed(monkeypatch):
    fake(monkeypatch, lambda case, job: entry(case, {}))
    result = a_suite([Case("logits", 64, 300)], seconds=0)()
    assert result["not_run"] == {"logits-T64-V300-bfloat16": "the time of the grid was over"}


@pytest.mark.parametrize(
    ("pattern", "text"), [("nothing-like-it", "matches none of these cases:"), ("(", "is not a regular expression")]
)
def test_a_bad_pattern_is_an_error_of_the_command_line(pattern, text, capsys):
    assert command.main(["--quick", "--only", pattern]) == 2
    assert text in capsys.readouterr().err


def test_a_pattern_picks_cases_by_name(capsys):
    assert command.main(["--core", "--only", "^logits-.*V32000", "--list", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == ["logits-T2048-V32000-float32"]
    assert matching(CORE_CPU, None) == CORE_CPU


def test_a_small_run_from_end_to_end(monkeypatch, capsys, tmp_path):
    """Real processes, and nothing is written. 16 MB of logits, to exceed the noise of memory. No peer has this path."""
    monkeypatch.chdir(tmp_path)
    cases = [Case("topk-forward-kl", 128, 32000, dtype="float32", kept=16)]
    quick = replace(GRIDS["quick", "cpu"], cases=cases, seconds=600, sample_seconds=0.3)
    monkeypatch.setitem(GRIDS, ("quick", "cpu"), quick)
    monkeypatch.setattr(report, "markdown", json.dumps)
    assert command.main(["--quick", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    (ran,) = result["cases"]
    assert {"naive", "kdloss"} <= set(ran["rows"])
    assert all(len(row["samples"]) >= 3 for row in ran["rows"].values() if not row["error"])
    # a float32 log-softmax, and a gradient of each of the two: the formula needs at least 2
    assert 1.9 < report.memory(ran, "naive") < 5
    assert 0.9 < report.memory(ran, "kdloss") < 3  # the gradient
    assert result["facts"]["torch"] == torch.__version__
    assert str(ROOT) not in json.dumps(result)
    assert list(tmp_path.iterdir()) == []


def test_the_parent_needs_no_torch():
    code = "import sys, benchmarks.__main__; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_the_last_words_of_a_process_that_dies_are_reported(tmp_path):
    job = {"device": "cpu", "threads": 1, "cases": [{"no such field": 1}]}
    with pytest.raises(command.WorkerError, match="TypeError"):
        list(command.results_of(job, timeout=60, compiled=str(tmp_path)))
