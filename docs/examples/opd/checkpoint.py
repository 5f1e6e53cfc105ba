"""Checkpoints that survive a kill at any moment, and a metrics file that ends as if there had been none.

A checkpoint is written beside its final name, flushed to the disk and then renamed: under its name it is complete. It
holds how long the metrics file was, and a restart cuts the file there.
"""

import difflib
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from opd import ranks
from opd.config import Config, ConfigError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def claim(config: Config) -> Iterator[None]:
    """Holds the run's folder for this process alone, and its `config.yaml` to what the run began with."""
    if ranks.rank() != 0:
        yield
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with (config.run_dir / "lock").open("w") as lock:  # the system lets go of it however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is at work in {config.run_dir}") from error
        _check_unchanged(config)
        yield


def _check_unchanged(config: Config) -> None:
    path = config.run_dir / "config.yaml"
    ours = OmegaConf.to_yaml(OmegaConf.structured(config))
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(ours)
        os.replace(partial, path)
        return
    there = path.read_text()
    differing = [line for line in difflib.ndiff(there.splitlines(), ours.splitlines()) if line[0] in "+-"]
    if differing:
        raise ConfigError(
            f"{config.run_dir} holds a run with another configuration; take another trial_name or delete it. "
            f"There (-) and here (+):\n" + "\n".join(differing)
        )


class Checkpoints:
    """The checkpoints of one run: `step-000010.pt`, the newest `keep` of them."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder, self.keep = folder, keep
        if ranks.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.partial"):  # of a kill in the middle of a save
                leftover.unlink()

    def save(self, step: int, *, model, optimizer, **rest: Any) -> None:
        """Saves weights, optimizer and random states of all processes, and `rest` as it is."""
        weights, optimizer_state = get_state_dict(model, optimizer, options=WHOLE)
        random_states = ranks.gather(random_state())
        if ranks.rank() == 0:
            state = {"step": step, "model": weights, "optimizer": optimizer_state, "random": random_states, **rest}
            write_whole(self.folder / f"step-{step:06d}.pt", state)
            for old in sorted(self.folder.glob("step-*.pt"))[: -self.keep]:
                old.unlink()

    def load(self, *, model, optimizer) -> dict | None:
        """Restores the newest checkpoint in place and returns its contents; None if there is none."""
        found = sorted(self.folder.glob("step-*.pt"))
        if not found:
            return None
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
        if len(state["random"]) != ranks.world_size():
            raise ConfigError(f"{found[-1]} is of {len(state['random'])} processes, this run of {ranks.world_size()}")
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=WHOLE
        )
        set_random_state(state["random"][ranks.rank()])
        return state


class MetricsFile:
    """JSON lines, one a record. Nothing in it depends on the clock, so that equal runs write equal bytes."""

    def __init__(self, path: Path, *, length: int = 0):
        self.path = path
        if ranks.rank() == 0:
            self.file = path.open("r+b" if path.exists() else "w+b")
            self.file.truncate(length)
            self.file.seek(length)

    def write(self, record: dict) -> None:
        """Appends a record."""
        if ranks.rank() == 0:
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if ranks.rank() == 0:
            self.file.close()

    def length(self) -> int:
        """The file's length in bytes, all of them on the disk: what a checkpoint remembers."""
        if ranks.rank() != 0:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()


def read_records(path: Path) -> list[dict]:
    """The whole lines of a metrics file, which another process may be writing to; none if there is no file yet."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_whole(path: Path, state: Any) -> None:
    """`torch.save`, but `path` either does not change or holds all of `state`, even if the machine stops."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def random_state() -> dict[str, torch.Tensor]:
    """The generators that sampling draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Puts back what `random_state` took."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
