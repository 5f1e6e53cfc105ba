"""Puts the example's modules on the path; fixtures: a run small enough for a test, the tokenizer and the models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

SMALL = (
    "experiment_name=test",
    "total_train_steps=4",
    "actor.optimizer.warmup_steps=2",
    "data.batch_size=4",
    "gconfig.n_samples=4",
    "evaluator.freq_steps=2",
    "evaluator.size=8",
    "evaluator.final_size=8",
    "saver.freq_steps=2",
)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., list[str]]:
    """Command-line arguments of a run of a few seconds; arguments that are passed come last and win."""

    def arguments(*overrides: str) -> list[str]:
        config = ["--config", str(EXAMPLES / "kdrl.yaml"), "--quiet"]
        return [*config, f"fileroot={tmp_path}", *SMALL, *overrides]

    return arguments


@pytest.fixture(scope="session")
def tokenizer():
    from opd import models

    return models.load_tokenizer(str(EXAMPLES / "tiny" / "student"))


@pytest.fixture
def load(tokenizer):
    """Loads a new copy of one of the tiny models."""
    from opd import models

    def policy(name: str, *, temperature: float = 1.0, trained: bool = True):
        path = str(EXAMPLES / "tiny" / name)
        return models.load_policy(
            path, vocab_size=len(tokenizer), temperature=temperature, dtype="float32", trained=trained
        )

    return policy
