"""A group of ranks in one process, on one device: threads that take turns, each running up to the next collective.

Kernels run on the device of the tests (`triton_harness.py`), one at a time. The gradient of hidden states stays each
rank's own share, and the caller adds the shares up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kdloss import VocabShard
from kdloss._distributed import collectives
from kdloss._divergences import sharded
from kdloss._softmax import whole_rows


class Ranks:
    """`run` calls a function once per rank with that rank's shard, and returns the results."""

    def __init__(self, bounds: list[tuple[int, int]]) -> None:
        self.bounds = bounds
        self.collectives = 0  # of the last run, per rank
        self._turn, self._all = threading.Lock(), threading.Barrier(len(bounds))
        self._brought: list[Any] = [None] * len(bounds)

    def run(self, call: Callable[[VocabShard], Any]) -> list[Any]:
        self.collectives = 0
        self._all.reset()
        found: list[Any] = [None] * len(self.bounds)
        errors: list[BaseException] = []

        def rank(number: int) -> None:
            try:
                with self._turn:
                    found[number] = call(_Shard(self, number))
            except threading.BrokenBarrierError:
                pass  # another rank's error is the one to report
            except BaseException as error:
                errors.append(error)
                self._all.abort()

        patches = [mock.patch.object(x, "gather", _gather) for x in (whole_rows, sharded, collectives)]
        threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(self.bounds))]
        with patches[0], patches[1], patches[2]:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return found

    def gather(self, number: int, x: Tensor) -> Tensor:
        self._brought[number] = x.detach().clone()
        self._wait()
        found = torch.stack(self._brought)  # raises where shapes differ
        self.collectives += number == 0
        self._wait()
        return found

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._all.wait(60)
        finally:
            self._turn.acquire()


class _Shard(VocabShard):
    def __init__(self, ranks: Ranks, number: int) -> None:
        self.ranks, self.rank, self.size = ranks, number, len(ranks.bounds)
        self.bounds = tuple(ranks.bounds)
        self.start, self.stop = ranks.bounds[number]
        self.sequence_parallel = self.gathered = False
        self.group = SimpleNamespace(_device_types=[torch.device("cpu"), torch.device("cuda")])

    def with_rows_gathered(self, gathered: bool) -> VocabShard:
        return self

    def sum_gradients(self, gradient: Tensor) -> Tensor:
        return gradient

    def part(self, x: Tensor, axis: int = 0) -> Tensor:
        return x.narrow(axis, self.start, self.stop - self.start)


def _gather(x: Tensor, shard: _Shard) -> Tensor:
    return shard.ranks.gather(shard.rank, x)
