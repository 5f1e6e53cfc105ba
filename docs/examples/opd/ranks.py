"""One process or many under `torchrun`: the few questions and sums that the rest of the example asks of them."""

import os

import torch
import torch.distributed as dist


def start() -> None:
    """Joins the process group that torchrun describes; nothing happens in a plain `python` run."""
    if "WORLD_SIZE" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
