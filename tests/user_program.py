"""Prints a program that uses every public name: the examples of the docstrings, one function for each name.

    python tests/user_program.py > program.py

`make build` runs it and checks its types, as those of any program that imports the installed package.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import textwrap

import kdloss
import kdloss.testing
from kdloss import schedules

PUBLIC: dict[str, object] = {
    **{name: getattr(kdloss, name) for name in kdloss.__all__},
    **{f"schedules.{name}": x for name, x in vars(schedules).items() if inspect.isfunction(x) and name[0] != "_"},
    **{f"testing.{name}": getattr(kdloss.testing, name) for name in kdloss.testing.__all__},
}
# The type checkers see the library's types if they see this one fault: torch.distributed does not export its stores.
HEAD = "# pyright: standard, reportUnnecessaryTypeIgnoreComment=true\n"
UNLISTED = ("dist.HashStore()", "  # type: ignore[attr-defined]  # pyright: ignore")


def statements(docstring: str) -> str:
    """The code of the examples; what the interactive shell would show is printed."""
    lines = []
    for example in doctest.DocTestParser().get_examples(docstring):
        (statement,) = ast.parse(example.source).body
        code = example.source.rstrip("\n") + (UNLISTED[1] if UNLISTED[0] in example.source else "")
        lines.append(f"print(\n{code}\n)" if isinstance(statement, ast.Expr) and example.want else code)
    return "\n".join(lines)


def program() -> str:
    code = {name.replace(".", "_"): statements(inspect.getdoc(x) or "") for name, x in PUBLIC.items()}
    functions = [f"def {name}() -> None:\n{textwrap.indent(body, '    ')}" for name, body in code.items() if body]
    calls = [f"{name}()" for name, body in code.items() if body]
    return "\n\n".join([HEAD, *functions, "\n".join(calls)]) + "\n"


if __name__ == "__main__":
    print(program(), end="")
