"""The example's modules on the path, a run small enough for a test, and its tokenizer and models, loaded once."""

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
    """Command-line arguments of a run of seconds; what is passed comes last and wins."""

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
    """Loads one of the tiny models afresh."""
    from opd import models

    def policy(name: str, *, temperature: float = 1.0, trained: bool = True):
        path = str(EXAMPLES / "tiny" / name)
        return models.load_policy(
            path, vocab_size=len(tokenizer), temperature=temperature, dtype="float32", trained=trained
        )

    return policy
