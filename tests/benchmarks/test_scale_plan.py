"""Holds docs/scale-out-plan.md to its script: every row of its tables, and rows computed here from published numbers.

`scale_out/cases_plan.py` tests that the bytes are those of real collectives.
"""

from __future__ import annotations

import pytest

from benchmarks import scale_plan
from benchmarks.scale_plan import ADAPTER, GIB, GPUS, LARGE, NVLINK, STUDENT, TEACHER, TOKENS, Layout

PAGE = scale_plan.PAGE.read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, str]]:
    block = PAGE.split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
    header, _, *cells = [[x.strip() for x in line.strip("|").split("|")] for line in block.split("\n") if line]
    return [dict(zip(header, x, strict=True)) for x in cells]


def test_the_page_holds_what_the_script_makes():
    assert scale_plan.updated(PAGE) == PAGE, "run: python -m benchmarks.scale_plan"


def test_a_page_without_one_of_the_tables_is_refused():
    with pytest.raises(ValueError, match="must hold the tables"):
        scale_plan.updated(PAGE.replace("table: heads", "table: tails"))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(STUDENT, 596_049_920), (TEACHER, 14_770_033_664), (LARGE, 70_553_706_496)],  # as in their checkpoints
)
def test_models_have_their_published_size(model, parameters):
    assert model.parameters() == parameters


def test_every_table_goes_from_8_to_1024_gpus():
    for name in ("student", "70B"):
        assert [row["GPUs"] for row in rows(name)][: len(GPUS)] == [str(n) for n in GPUS]
    for head in ("0.6B", "70B"):
        assert [row["GPUs"] for row in rows("heads") if row["head"] == head] == [str(n) for n in GPUS]


def shown(found: str, expected: float) -> None:
    """Equal to three digits; the figures here leave out norms, which are not split."""
    assert float(found) == pytest.approx(expected, rel=5e-3, abs=5.1e-3)


def test_rows_of_the_student():
    parameters = 596_049_920
    for row in rows("student")[: len(GPUS)]:
        n = int(row["GPUs"])
        shown(row["state GiB"], 16 * parameters / 8 / GIB)
        gradient = 4 * parameters / 8  # of a node's share, all-reduced over the nodes
        shown(row["adapter GiB"], 2 * (n // 8 - 1) / (n // 8) * gradient / GIB)
        weights = 2 * (2 * parameters - 151936 * 1024)  # the embedding is gathered once
        shown(row["NVLink GiB"], 7 / 8 * (weights + 4 * parameters) / GIB)
        shown(row["NVLink ms"], 1e3 * 7 / 8 * (weights + 4 * parameters) / 450e9)


def test_rows_of_the_teacher():
    split, in_node, *over_all = rows("teacher")
    shown(split["state GiB"], 2 * 14_770_033_664 / 4 / GIB)
    shown(split["NVLink GiB"], 32768 * (97 * 2 * 3 / 4 * 2 * 5120 + 3 * 12) / GIB)  # rows, and three values per token
    shown(in_node["NVLink GiB"], 7 / 8 * 2 * 14_770_033_664 / GIB)
    for row in over_all:
        n = int(row["GPUs"])
        shown(row["adapter GiB"], (n - 1) / n * 2 * 14_770_033_664 / GIB)
        shown(row["adapter ms"], 1e3 * (n - 1) / n * 2 * 14_770_033_664 / 50e9)


def test_rows_of_the_large_model():
    parameters, ends = 70_553_706_496, 2 * 128256 * 8192
    for row in rows("70B"):
        n, nodes = int(row["GPUs"]), int(row["GPUs"]) // 8
        assert row["layout"] == ("TP 8" if n == 8 else f"TP 8, FSDP2 {nodes}")
        shown(row["state GiB"], 16 * parameters / n / GIB)
        sent = (nodes - 1) / nodes * (4 * (parameters - ends) + 2 * ends + 4 * parameters) / 8
        shown(row["adapter GiB"], sent / GIB)
        shown(row["adapter ms"], 1e3 * sent / 50e9)
        shown(row["operations ms"], 1e3 * 8 * parameters * 8192 / 8 / 400e12)
        assert (row["first limit"] == "memory") == (n <= 16)


def test_rows_of_the_heads():
    for row in rows("heads"):
        scores = "scores" in row["head"]
        large, ranks = row["head"].startswith("70B"), 8 if row["head"].startswith("70B") else 4
        vocabulary, width = {"0": (151936, 1024), "1": (152064, 5120), "7": (128256, 8192)}[row["head"][0]]
        numbers = 3 if scores else 4 if large else 5
        shown(row["forward MiB"], 8192 * 4 * numbers * (ranks - 1) / 2**20)
        shown(row["dH MiB"], 0 if scores else 2 * (ranks - 1) / ranks * 8192 * 2 * width / 2**20)
        if scores:
            continue
        nodes, shard = int(row["GPUs"]) // 8, 2 if not large else int(row["GPUs"]) // 8
        mine = vocabulary * width / ranks
        shown(row["state GiB"], 16 * mine / shard / GIB)
        split, copied = 6 * (shard - 1) / shard * mine, 2 * (nodes - 1) / nodes * 4 * mine / shard
        shown(row["NVLink, weights MiB"], 0 if large else split / 2**20)
        shown(row["adapter, weights MiB"], (split if large else copied) / 2**20)


def test_what_the_page_says_of_the_rows():
    student, teacher, large = (
        {(row["GPUs"], row["layout"]): row for row in rows(name)} for name in ("student", "teacher", "70B")
    )
    for split, copied in (("FSDP2 64", "FSDP2 8, copies 8"), ("FSDP2 1024", "FSDP2 8, copies 128")):
        gpus = split.removeprefix("FSDP2 ")
        whole, own = student[gpus, split], student[gpus, copied]
        assert 7 < float(whole["adapter GiB"]) / float(own["adapter GiB"]) < 9
        assert 0.9 < float(own["state GiB"]) - float(whole["state GiB"]) < 1.15
    assert "saves 1 GiB of state, and sends about eight times as much over the adapters" in PAGE
    sent = float(teacher["8 to 1024", "TP 4"]["NVLink GiB"]) * 1024 / 32768  # MiB per token
    weights = float(teacher["8 to 1024", "FSDP2 8"]["NVLink GiB"])
    equal = round(weights * 1024 / sent / 4, -2)  # a group of four GPUs scores the tokens of all four
    assert f"{sent:.1f} MiB per token; FSDP2 sends" in PAGE
    assert f"{weights:.0f} GiB per pass. At about {equal:.0f} tokens per GPU" in PAGE
    held = {
        gpus: [float(row[x]) for x in ("state GiB", "gathered GiB", "kept GiB")] for (gpus, _), row in large.items()
    }
    memory = 80e9 / GIB
    assert held["8"][0] > memory > sum(held["32"])
    assert held["16"][0] < memory < sum(held["16"])


def test_the_limit_is_where_the_wire_takes_as_long_as_the_arithmetic():
    for model, layout in ((STUDENT, Layout(1, 8, 4)), (LARGE, Layout(8, 16)), (TEACHER, Layout(1, 8))):
        text = scale_plan.limit(model, layout, TOKENS, trains=model is not TEACHER)
        wire, tokens = text.split(", below ")
        seconds = scale_plan.times(model, layout, float(tokens.split()[0]), trains=model is not TEACHER)
        assert seconds[wire] == pytest.approx(seconds["operations"], rel=2e-3)
        assert max(seconds.values()) == pytest.approx(seconds[wire], rel=2e-3)


def test_an_axis_that_leaves_the_node_is_on_the_adapters():
    sent = scale_plan.Sent(1, 10, 100)
    assert scale_plan.wires(Layout(8, 1, 1), sent) == (111, 0)
    assert scale_plan.wires(Layout(4, 2, 2), sent) == (11, 100)
    assert scale_plan.wires(Layout(4, 4, 1), sent) == (1, 110)
    assert ADAPTER == 400e9 / 8 < NVLINK


def test_the_page_on_scale_out_holds_the_collectives_that_were_counted():
    root = scale_plan.PAGE.parents[1]
    counted = {}
    for line in (root / "benchmarks" / "results" / "collectives.md").read_text("utf-8").splitlines():
        if line[:3] in ("| 2", "| 4"):
            ranks, path, *counts = [cell.strip() for cell in line.strip("|").split("|")]
            counted[int(ranks), path] = [int(x) for x in counts]
    page = (root / "docs" / "scale-out.md").read_text("utf-8")
    for said, path in (
        ("three all-reduces", "hidden, three all-reduces, one of dH"),
        ("`linear_token_logprobs`", "`linear_token_logprobs`"),
    ):
        forward, sent, backward, _ = counted[4, path]
        assert f"| {said} | {forward}, {backward} of dH | {sent} |" in page
    for n in (2, 4):
        assert counted[n, "`token_logprobs`"][1] == 12 * (n - 1)
        assert counted[n, "logits, three all-reduces"][1] == 24 * (n - 1) / n
        assert counted[n, "`linear_token_logprobs`"][3] == 2 * 4 * 64 * (n - 1) / n  # D = 64 in float32, twice bf16
