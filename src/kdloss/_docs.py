"""Shared docstring texts: each is written once, and every `help()` is complete.

A docstring line that contains only `{name}` stands for a text that several functions share. The decorator
`@documented(TEXTS)` replaces it with the entry `name: text`, wrapped. Lines indented below it continue the entry, with
what holds for this function only. The decorator returns the function that it was given, so type checkers,
`torch.compile` and pickling see no decorator.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

_PLACE = re.compile(r"^( *)\{(\w+)\}((?:\n\1 +\S.*)*)$", re.MULTILINE)
_WIDTH = 112


def documented(*texts: Mapping[str, str]) -> Callable[[_F], _F]:
    """Replace each line `{name}` of a function's docstring with `name: text`.

    Args:
        texts: texts by argument name. If a name is in two mappings, the later one wins.

    Raises:
        KeyError: the docstring has a name that is in none of them.
    """
    known = {name: text for mapping in texts for name, text in mapping.items()}

    def entry(place: re.Match[str]) -> str:
        indent, name, more = place.groups()
        text = " ".join(f"{name}: {known[name]} {more}".split())
        return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + " " * 4)

    def fill_in(function: _F) -> _F:
        if function.__doc__ is not None:  # `python -OO` has removed it
            function.__doc__ = _PLACE.sub(entry, function.__doc__)
        return function

    return fill_in
