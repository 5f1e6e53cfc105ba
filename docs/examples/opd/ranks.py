"""One process or many under `torchrun`: the few questions and sums that the rest of the example asks of them."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist


def launched() -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in os.environ


def start() -> None:
    """Joins the process group that torchrun describes; nothing happens in a plain `python` run."""
    if not launched():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave(main: Callable[[], int | None]) -> NoReturn:
    """Ends a process that joins a process group: with the code that `main` returns, or 1 and a traceback if it raises.

    The interpreter is not finalized. Meshes and sharded modules keep the group alive after `destroy_process_group`, and
    with it the worker threads of gloo. When such a thread releases the last collective's tensors, which are Python
    objects, it asks for the interpreter's lock. If the interpreter is being finalized, the thread has to exit within a
    destructor, and the process aborts: "terminate called without an active exception", about once in 30 runs.

    Output is flushed; exit handlers do not run, and what a `multiprocessing.Queue` still holds is lost.
    """
    try:
        code = main() or 0
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as error:  # of argparse, or with a text
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        # The group stays: other ranks may wait in a collective, and leaving it could wait for them.
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):  # a reader that is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    """This process's number; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over the processes, the same bits on each."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather(value: object) -> list:
    """Every process's `value`, in order."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values
