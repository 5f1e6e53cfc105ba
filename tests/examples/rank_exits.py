"""Counts ranks that abort as they exit: pairs of ranks, one pair after the other, while every core is kept busy.

    python tests/examples/rank_exits.py [--exits 300] [--finalize]

Each rank makes one step with a tiny sharded model, gathers its weights and ends as the example's ranks do. With
`--finalize` it ends as an ordinary script does, and a rank may abort. Not a test: it counts a rare event.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
from opd.ranks import leave


def step(rank: int, store: str) -> None:
    """One step of a sharded model; its last collectives are the all-gathers of the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model(torch.ones(2, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exits", type=int, default=300, help="pairs of ranks (default %(default)s)")
    parser.add_argument("--finalize", action="store_true", help="let Python finalize the ranks")
    options = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    folder = tempfile.mkdtemp()
    codes: Counter[int] = Counter()
    for number in range(1, options.exits + 1):
        pids = []
        for rank in (0, 1):
            if pid := os.fork():  # forked, because a fresh process imports for seconds
                pids.append(pid)
            elif options.finalize:
                step(rank, f"{folder}/{number}")
                dist.destroy_process_group()
                return 0
            else:
                leave(lambda rank=rank, store=f"{folder}/{number}": step(rank, store))
        codes.update(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        print(f"\r{number} of {options.exits}: exit codes {dict(codes)}", end="", flush=True)
    shutil.rmtree(folder)
    for process in busy:
        process.kill()
    print(f"\n{codes.total() - codes[0]} of {codes.total()} ranks ended with another code than 0")
    return int(codes.total() != codes[0])


if __name__ == "__main__":
    sys.exit(main())
