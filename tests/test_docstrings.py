"""Holds the docstrings of public names: whole by themselves, every parameter named, an example that uses the name.

A reader of `help(kdloss.X)` needs no other page: nothing is "as in" another function, and nothing is left to compose.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from kdloss._docs import documented
from user_program import PUBLIC, program, statements

FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
TUPLES = {name: x for name, x in PUBLIC.items() if inspect.isclass(x) and issubclass(x, tuple)}
# `config` holds `KDRLConfig`, and `schedules` the functions; both have examples of their own.
WITH_EXAMPLE = {name: x for name, x in PUBLIC.items() if name not in ("config", "schedules")}
# Layout, counts, numbers and tools: they are no losses, and make none.
NO_GRADIENT = re.compile(
    r"cu_seqlens_from_lengths|segment_ids|next_token_labels|response_mask|\w+_count|pack|unpack|to_\w+_positions"
    r"|broadcast_to_tokens|align_responses|segment_(sum|mean)|(schedules|testing)\.\w+"
)

SECTION = re.compile(r"^(Args|Attributes|Returns|Expected gradient[^:\n]*|Raises[^:\n]*|Example|Source):", re.MULTILINE)
# Words that send the reader to another docstring; "such as `x`" gives an example and does not.
HOP = re.compile(
    r"\bas (in|for|with) (the )?`|(?<!such )\bas `|as above|as in the two|(Args|errors|Arguments)[^.\n]* (as|are those)"
)


def sections(doc: str) -> dict[str, str]:
    """The parts of a docstring by their heading; what stands before the first one is ''."""
    cuts = [*SECTION.finditer(doc)]
    ends = [*(cut.start() for cut in cuts[1:]), len(doc)]
    found = {cut.group(1).split()[0]: doc[cut.end() : end] for cut, end in zip(cuts, ends, strict=True)}
    return {"": doc[: cuts[0].start()] if cuts else doc, **found}


def entries(section: str) -> set[str]:
    """The names that a section of `name: text` or `a, b: text` describes."""
    found = re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", section, re.MULTILINE)
    return {name.lstrip("*") for names in found for name in names.split(", ")}


def faults(name: str, function: Callable[..., Any]) -> list[str]:
    doc = inspect.getdoc(function) or ""
    parts = sections(doc)
    found = [f"{{{left}}} was not put in" for left in re.findall(r"^ *\{(\w+)\}$", doc, re.MULTILINE)]
    found += [f"sends the reader elsewhere: {hop.group(0)!r}" for hop in HOP.finditer(doc)]
    missing = set(inspect.signature(function).parameters) - entries(parts.get("Args", ""))
    found += [f"does not describe {parameter}" for parameter in sorted(missing)]
    wanted = ["Returns", "Example"] + ([] if NO_GRADIENT.fullmatch(name) else ["Expected"])
    found += [f"has no section {heading!r}" for heading in wanted if heading not in parts]
    lines = re.findall(r"^ *(?:>>>|\.\.\.) ", parts.get("Example", ""), re.MULTILINE)
    if not 3 <= len(lines) <= 8:
        found.append(f"has an example of {len(lines)} lines, not of 3 to 8")
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_is_whole(name):
    assert faults(name, FUNCTIONS[name]) == []


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_runs_as_it_is_pasted(name):
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    example = parser.get_doctest(inspect.getdoc(WITH_EXAMPLE[name]) or "", {}, name, None, None)
    runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_uses_the_name(name):
    """And so does the program that `make build` checks and runs as a user's."""
    code = statements(inspect.getdoc(WITH_EXAMPLE[name]) or "")
    used = {getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(ast.parse(code))}
    assert name.rpartition(".")[2] in used
    assert f"def {name.replace('.', '_')}() -> None:\n" in program()


@pytest.mark.parametrize("name", TUPLES)
def test_help_says_what_each_field_is(name):
    doc = inspect.getdoc(TUPLES[name]) or ""
    assert entries(sections(doc).get("Attributes", "")) == set(TUPLES[name]._fields)
    assert HOP.search(doc) is None


def test_each_kind_of_fault_is_found():
    @documented({"x": "the tensor."})
    def function(x: int, y: int) -> None:
        """Do as in `other`.

        Args:
            {x}
                Twice.
            {z }

        Example:
            >>> 1 + 1
            2
        """

    assert "x: the tensor. Twice.\n" in (function.__doc__ or "")
    assert faults("function", function) == [
        "sends the reader elsewhere: 'as in `'",
        "does not describe y",
        "has no section 'Returns'",
        "has no section 'Expected'",
        "has an example of 1 lines, not of 3 to 8",
    ]


def test_a_text_that_nobody_wrote_is_an_error_at_import():
    def function() -> None:
        """Nothing.

        {unknown}
        """

    with pytest.raises(KeyError, match="unknown"):
        documented({"x": "the tensor."})(function)
