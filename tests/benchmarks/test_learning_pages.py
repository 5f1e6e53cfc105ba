"""Holds what pages say of the learning study to its committed result."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks.learning import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "learning"
RESULT = json.loads((RESULTS / "learning.json").read_text(encoding="utf-8"))

# Phrases of a page, each with the task and methods whose mean accuracies it gives, in order: at each method's own rate,
# or with "=" behind the method at the common one. Line ends count as spaces.
SAID: dict[str, dict[str, str]] = {
    "learning.md": {
        "full {}, sampled {}": "A full-reverse sampled",
        "`kdrl_loss` {}, the teacher alone {}, the reward alone {}": "B kdrl-.3 sampled grpo",
        "plus GRPO, reaches {}": "B forward-hopeless-and-grpo",
        "groups stops at {}, and only in groups": "B forward-and-grpo",
        "without a success it reaches {}": "B forward-hopeless-and-grpo",
        "ends at {}, the one that falls over the whole run at {}": "B kdrl-linear kdrl-annealed",
        "the weights .1, .3 and 1 end at {}, {} and {}": "B kdrl-.1 kdrl-.3 kdrl-1",
        "fresh rollouts ({}): GRPO": "C sampled=",
        "with PPO's clip ends at {}, without a ratio at {}": "C stale-8-grpo-clip= stale-8-grpo-no-ratio=",
        "`kdrl_loss` ends at {} there": "C stale-8-kdrl-1",
    },
    "weights.md": {
        "| .1; .3; 1 | {}; **{}**; {} | {} | {} |": "B kdrl-.1 kdrl-.3 kdrl-1 grpo sampled",
        "in groups without a success | .3 | {} |": "B kdrl-hopeless",
        "| .1; 1; 3; 10 | **{}**; **{}**; {}; {} | {} | {} |": "D kdrl-.1= kdrl-1= kdrl-3= kdrl-10= grpo= sampled=",
    },
    "which-loss.md": {
        "D: {}, where the teacher alone ends at {}": "D kdrl-1= sampled=",
        "B: {}, where `kdrl_loss` ends at {}": "B forward-hopeless-and-grpo kdrl-.3",
        "the teacher alone at {} and the reward alone at {}": "B sampled grpo",
        "B: {} with the mask, {} without": "B kdrl-hopeless kdrl-.3",
        "B: {}; two of fifteen": "B sft-then-grpo",
        "A: forward {}, reverse {}, sampled {}": "A full-forward full-reverse sampled",
        "A: {} with K = 4": "A top4-sampled",
        "A: {}, {}. For the reverse KL never": "A top4-forward-bucket top4-reverse-bucket",
        'or "generalized" with a small K: {}': "A top4-reverse-truncate",
        "`distillation_loss` | A: {}": "A sampled",
        "{} at half the rate and {} at the full one; fresh {}": "C stale-8-ratio stale-8-ratio= sampled",
        "C: frozen {}, folded {}, computed again {}": "C stale-8-frozen-ratio= stale-8-folded= stale-8-ratio=",
        "(B: {} and {}, within the noise)": "B kdrl-annealed kdrl-.3",
        "within a fifth of the run was worse ({})": "B kdrl-linear",
        "D, at weight 3, ends at {}": "D literal-3=",
        "empty answers: A, {}": "A sampled-discount-1",
    },
}


@pytest.mark.parametrize("page", SAID)
def test_a_page_says_what_the_runs_found(page):
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    for phrase, of in SAID[page].items():
        task, *methods = of.split()
        means = [
            statistics.fmean(report.Runs(RESULT, task, common=name.endswith("=")).values(name.removesuffix("=")))
            for name in methods
        ]
        said = phrase.format(*(f"{mean:.2f}".removeprefix("0") for mean in means))
        assert said in text, said


def test_page_and_report_hold_the_committed_result():
    page = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    assert {name for _, name, _ in report.BLOCK.findall(page)} == {*report.blocks(RESULT)}
    assert report.documented(page, RESULT) == page, "run: python -m benchmarks.learning --report JSON --save"
    assert report.markdown(RESULT) in (RESULTS / "learning.md").read_text(encoding="utf-8")
