"""Every path's inputs, who takes part in it, and the contender that its speeds are relative to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import divergences, problems, topk
from .cases import Case
from .contenders import Contender, Problem


class Path(NamedTuple):
    """`problem(case, device, with_truth)`, and `contenders(case, device, absent)`, which fills in who is absent."""

    problem: Callable[[Case, str, bool], Problem]
    contenders: Callable[[Case, str, dict[str, str]], list[Contender]]
    reference: str


PATHS = {
    "logits": Path(problems.logits_problem, problems.logits_contenders, "naive"),
    "hidden": Path(problems.hidden_problem, problems.hidden_contenders, "naive"),
    "fractions": Path(problems.fractions_problem, problems.fractions_contenders, "kdloss 1"),
    "fused": Path(problems.fused_problem, problems.fused_contenders, "kdloss two-step"),
    "ce": Path(problems.ce_problem, problems.ce_contenders, "naive"),
    "tail": Path(problems.tail_problem, problems.tail_contenders, "gather"),
    **{name: Path(divergences.problem, divergences.contenders, "naive") for name in divergences.NAMES},
    **{name: Path(topk.problem, topk.contenders, "naive") for name in topk.NAMES},
}
