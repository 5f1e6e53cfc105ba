"""A progress bar where tqdm is installed, and a line a step where it is not."""

from __future__ import annotations

import importlib
import sys
from typing import Any


class Progress:
    """What is running now, on standard error."""

    def __init__(self) -> None:
        self.bar: Any = None
        try:
            self.tqdm: Any = importlib.import_module("tqdm").tqdm
        except ModuleNotFoundError:
            self.tqdm = None
            print("no progress bar: tqdm is not installed (pip install tqdm)", file=sys.stderr)
        self.label = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin(self, steps: int) -> None:
        if self.tqdm:
            self.bar = self.tqdm(total=steps, file=sys.stderr, dynamic_ncols=True, leave=False)

    def extend(self, steps: int) -> None:
        if self.bar is not None:
            self.bar.total += steps

    def step(self, label: str) -> None:
        """The step before is over, `label` begins."""
        if self.bar is None:
            print(label, file=sys.stderr)
            return
        if self.label:
            self.bar.update(1)
        self.label = label
        self.bar.set_description(label)

    def note(self, contender: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(contender, refresh=False)
            self.bar.update(0)
