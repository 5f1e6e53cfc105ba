"""Holds what the kernels cost in the code that an H200 would run: spills, registers, widths of accesses, instructions.

`benchmarks.kernel_costs` calls the public functions that have kernels and compiles what these calls launch for sm_90,
which needs no GPU. All launches are more than a minute's work, so the tests have bfloat16, even, odd and cut rows, the
options that add the most code, and some float32. Left out are float16, most options set alone, most calls with padding
or few rows, and of several launches of one kernel in a call all but the first.
`python -m benchmarks.kernel_costs --every` compiles these too: some 1000 codes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import kernel_costs
from benchmarks.kernel_costs import MOST_REGISTERS, ROOT, SMALL, STREAMS, Cost
from kdloss._triton import _divergence_kernels

RENEW = "look at what changed, then run: python -m benchmarks.kernel_costs --write"
FEWEST = 8  # bytes of an access along the vocabulary


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """{"costs": {key: cost}, "missing": ...}, from a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.kernel_costs", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    return found | {"costs": {key: Cost(**cost) for key, cost in found["costs"].items()}}


def test_every_kernel_is_reached_by_a_call_of_a_public_function(compiled):
    assert compiled["missing"] == {"functions": [], "kernels": []}
    assert not set(STREAMS) & SMALL


def test_nothing_spills_and_every_grid_is_legal(compiled):
    """All axes but the first end at 65535."""
    for cost in compiled["costs"].values():
        assert cost.spilled_bytes == 0, cost
        assert cost.registers <= MOST_REGISTERS, cost
        assert cost.grid[0] < 2**31, cost
        assert all(n < 2**16 for n in cost.grid[1:]), cost


def test_logits_are_read_and_written_8_bytes_at_a_time(compiled):
    along = {key: cost for key, cost in compiled["costs"].items() if cost.instructions}
    assert {key: cost.narrowest for key, cost in along.items() if cost.narrowest < FEWEST} == {}


def test_a_trip_has_one_tile(compiled):
    """Otherwise costs per logit may be misread, as the logits of a trip are counted by what it moves."""
    walks = [cost for cost in compiled["costs"].values() if cost.instructions and cost.read]
    assert [cost for cost in walks if cost.trips != 1] == []


def test_costs_are_those_recorded(compiled):
    """More instructions per logit are a loss, fewer a gain to record. They depend on the version of ptxas."""
    stored = kernel_costs.stored()
    if importlib.metadata.version("triton") != stored["triton"]:
        pytest.skip(f"recorded with triton {stored['triton']}")
    now, then = {key: cost._asdict() for key, cost in compiled["costs"].items()}, stored["costs"]
    assert now.keys() == then.keys(), RENEW
    changed = {key: {name: (x, now[key][name]) for name, x in then[key].items() if x != now[key][name]} for key in then}
    assert {key: fields for key, fields in changed.items() if fields} == {}, RENEW


def test_the_list_of_what_a_mixture_takes_is_complete():
    """In the docstring of the kernels: instructions by what they are for."""
    listed = re.findall(r"  (\d+) {4}(?=\S)", _divergence_kernels.__doc__ or "")
    cost = Cost(**kernel_costs.stored()["costs"]["mixture_kernel: generalized_jsd, bf16, even"])
    assert sum(map(int, listed)) == round(cost.instructions)


def test_the_page_has_the_recorded_costs():
    page = kernel_costs.PAGE.read_text(encoding="utf-8")
    assert kernel_costs.updated(page, kernel_costs.stored()) == page, RENEW
    with pytest.raises(ValueError, match="must hold the tables"):
        kernel_costs.updated(page.replace("table: costs", "table: prices"), kernel_costs.stored())


def test_issue_is_the_time_of_instructions_by_the_time_of_bytes():
    """While an H200 moves 2 bytes at 4.3 TB/s, its multiprocessors issue 13.8 instructions of a thread."""
    cost = Cost("forward_kernel", "", [1], 32, 0, 1, read=2, instructions=13.79, special=1)
    assert cost.issue == pytest.approx(1, abs=1e-3)
    assert cost._replace(special=3.0).issue == pytest.approx(24 / 13.79, abs=1e-3)  # a special function takes 8
    assert cost._replace(written=2).issue == pytest.approx(0.5, abs=1e-3)
