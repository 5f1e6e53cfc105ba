"""`python -m benchmarks.scale_plan`: the tables of docs/scale-out-plan.md: what a rank holds and sends.

Nothing here is measured: sizes of models and layouts go in, bytes come out. What a rank sends is held to collectives
counted on gloo by `tests/scale_out/cases_plan.py`, byte for byte, on a small model; what it holds beside its state is
arithmetic alone.

    tensor       ranks that share every matrix and the vocabulary (tensor parallel), on NVLink
    shard        ranks over which FSDP2 splits what each of those has
    replicate    copies of that (HSDP), whose gradients are all-reduced
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .collectives import RING
from .report import table, with_tables

PAGE = Path(__file__).parents[1] / "docs" / "scale-out-plan.md"
MIB, GIB = 2**20, 2**30
NODE = 8  # GPUs that NVLink joins
NVLINK, ADAPTER = 450e9, 50e9  # bytes a second, a GPU and a direction: NVLink 4; one 400 Gb/s adapter a GPU
MEMORY = 80e9  # bytes of an H100
RATE = 400e12  # operations a second that training reaches
TOKENS = 8192  # trained tokens of a micro-batch, of the ranks that share every matrix
LOW, WIDE = 2, 4  # bytes of bfloat16, in which weights and rows travel, and of float32, in which gradients are summed
STATE = 4 * WIDE  # bytes a parameter: weights, gradients and Adam's two moments
# numbers of float32 a token that a rank puts into the all-gathers of a vocabulary split across ranks
NUMBERS = {"linear_token_logprobs": 3, "fused_linear_loss": 4, "linear_forward_kl": 5, "linear_generalized_jsd": 7}


@dataclass(frozen=True)
class Model:
    """The sizes that count, of a Qwen or Llama."""

    layers: int
    width: int  # D
    queries: int  # heads x width of a head
    keys: int
    inner: int
    vocabulary: int  # V, padding included
    tied: bool = False
    head_norms: int = 0  # entries of the norms of queries and keys
    biased: bool = False  # queries, keys and values

    def layer(self, tensor: int = 1) -> float:
        """Parameters of one layer on one of `tensor` ranks: norms are whole on each."""
        matrices = self.width * (2 * self.queries + 2 * self.keys + 3 * self.inner)
        biases = self.queries + 2 * self.keys if self.biased else 0
        return (matrices + biases) / tensor + 2 * self.width + self.head_norms

    def root(self, tensor: int = 1) -> float:
        """The rest: embedding, head and the last norm."""
        return self.head(tensor) * (1 if self.tied else 2) + self.width

    def head(self, tensor: int = 1) -> float:
        return self.vocabulary * self.width / tensor

    def parameters(self, tensor: int = 1) -> float:
        return self.layers * self.layer(tensor) + self.root(tensor)


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    shard: int = 1
    replicate: int = 1

    def __str__(self) -> str:
        parts = [("TP", self.tensor), ("FSDP2", self.shard), ("copies", self.replicate)]
        return ", ".join(f"{name} {size}" for name, size in parts if size > 1)


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in one step of one micro-batch, on each axis of its layout."""

    tensor: float
    shard: float
    replicate: float


def all_gather(whole: float, ranks: int) -> float:
    return RING["all_gather_into_tensor"](ranks) * whole / ranks


def reduce_scatter(whole: float, ranks: int) -> float:
    return RING["reduce_scatter_tensor"](ranks) * whole


def all_reduce(whole: float, ranks: int) -> float:
    return RING["all_reduce"](ranks) * whole


def split_vocabulary(width: int, tokens: float, ranks: int, loss: str, *, trains: bool) -> float:
    """What the loss itself sends: a few numbers a token forward, and the sum of dH in the hidden states' dtype."""
    numbers = NUMBERS[loss] * WIDE * tokens * ranks
    return all_gather(numbers, ranks) + (all_reduce(LOW * tokens * width, ranks) if trains else 0)


def split_layers(model: Model, tokens: float, ranks: int, *, trains: bool) -> float:
    """Rows of the embedding, and of attention and MLP in each layer; the same two backward.

    A layer that is computed anew for the backward stops before the second: nothing waits for it.
    """
    rows = 1 + 2 * model.layers + (3 * model.layers if trains else 0)
    return rows * all_reduce(LOW * tokens * model.width, ranks)


def sent(
    model: Model, layout: Layout, *, tokens: float = TOKENS, loss: str = "linear_token_logprobs", trains: bool = True
) -> Sent:
    """Layers are gathered forward and backward, the root once; gradients are scattered in float32."""
    layers, root = model.layers * model.layer(layout.tensor), model.root(layout.tensor)
    of_tensor = split_layers(model, tokens, layout.tensor, trains=trains)
    of_tensor += split_vocabulary(model.width, tokens, layout.tensor, loss, trains=trains)
    return Sent(
        of_tensor, *split_parameters((2 if trains else 1) * layers + root, layers + root, layout, trains=trains)
    )


def sent_for_head(model: Model, layout: Layout, *, tokens: int = TOKENS, loss: str, trains: bool) -> Sent:
    """What is due to the head and the loss alone, of `sent`."""
    head = model.head(layout.tensor)
    of_tensor = split_vocabulary(model.width, tokens, layout.tensor, loss, trains=trains)
    return Sent(of_tensor, *split_parameters(head, head, layout, trains=trains))


def split_parameters(gathered: float, parameters: float, layout: Layout, *, trains: bool) -> tuple[float, float]:
    of_shard = all_gather(LOW * gathered, layout.shard)
    if not trains:
        return of_shard, 0
    of_shard += reduce_scatter(WIDE * parameters, layout.shard)
    return of_shard, all_reduce(WIDE * parameters / layout.shard, layout.replicate)


def state(model: Model, layout: Layout, *, trains: bool = True) -> float:
    """Bytes that a rank holds between steps."""
    return (STATE if trains else LOW) * model.parameters(layout.tensor) / layout.shard


def gathered(model: Model, layout: Layout, *, trains: bool = True) -> float:
    """Bytes of weights put together at the worst moment: the root's, and those of a layer and of the next.

    In training also their gradients, of the root and of one layer, beside a float32 copy that is on its way.
    """
    root, layer = model.root(layout.tensor), model.layer(layout.tensor)
    if trains:
        return (2 * LOW + WIDE) * root + (3 * LOW + WIDE) * layer
    return LOW * (root + 2 * layer) if layout.shard > 1 else 0


def kept(model: Model, *, tokens: int = TOKENS) -> float:
    """Bytes of each layer's input, kept for the backward (activation checkpointing), and of the hidden states."""
    return LOW * tokens * model.width * (model.layers + 1)


STUDENT = Model(28, 1024, 2048, 1024, 3072, 151936, tied=True, head_norms=2 * 128)  # Qwen3-0.6B
TEACHER = Model(48, 5120, 5120, 1024, 13824, 152064, biased=True)  # Qwen2.5-14B-Instruct
LARGE = Model(80, 8192, 8192, 1024, 28672, 128256)  # Llama-3-70B
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def wires(layout: Layout, of: Sent) -> tuple[float, float]:
    """Bytes on NVLink and on the adapter. Axes fill a node from the inside; one that leaves it is on the adapter."""
    inside = outside = 0.0
    reach = 1
    for size, amount in ((layout.tensor, of.tensor), (layout.shard, of.shard), (layout.replicate, of.replicate)):
        reach *= size
        inside, outside = (inside + amount, outside) if reach <= NODE else (inside, outside + amount)
    return inside, outside


def operations(model: Model, layout: Layout, tokens: float, *, trains: bool) -> float:
    """Of one rank: 2 a parameter and token forward, as many for a layer computed anew, and 4 backward."""
    return (8 if trains else 2) * model.parameters() * tokens / layout.tensor


def times(model: Model, layout: Layout, tokens: float, *, trains: bool) -> dict[str, float]:
    """Seconds, each by itself: nothing overlaps, and each wire carries all that it can."""
    inside, outside = wires(layout, sent(model, layout, tokens=tokens, trains=trains))
    return {
        "operations": operations(model, layout, tokens, trains=trains) / RATE,
        "NVLink": inside / NVLINK,
        "adapter": outside / ADAPTER,
    }


def limit(model: Model, layout: Layout, tokens: int, *, trains: bool) -> str:
    """What gives first: memory, or the wire that takes longer than the arithmetic as a step's tokens grow fewer."""
    if held(model, layout, tokens, trains=trains) > MEMORY:
        return "memory"
    idle, busy = (times(model, layout, n, trains=trains) for n in (0, tokens))
    fewest = {}
    for wire in ("NVLink", "adapter"):
        spare = (busy["operations"] - busy[wire] + idle[wire]) / tokens  # seconds a token in which the wire keeps up
        fewest[wire] = idle[wire] / spare if spare > 0 else float("inf")
    wire = max(fewest, key=lambda name: fewest[name])
    return f"{wire}, below {number(fewest[wire])} tokens" if fewest[wire] else "operations"


def held(model: Model, layout: Layout, tokens: int, *, trains: bool) -> float:
    found = state(model, layout, trains=trains) + gathered(model, layout, trains=trains)
    return found + (kept(model, tokens=tokens) if trains else 0)


def row(gpus: str, model: Model, layout: Layout, *, tokens: int = TOKENS, trains: bool = True) -> list[str]:
    parts = [state(model, layout, trains=trains), gathered(model, layout, trains=trains)]
    parts += [kept(model, tokens=tokens)] if trains else []
    parts += wires(layout, sent(model, layout, tokens=tokens, trains=trains))
    seconds = times(model, layout, tokens, trains=trains).values()
    return [
        gpus,
        str(layout),
        *(number(x / GIB) for x in parts),
        *(number(1e3 * x) for x in seconds),
        limit(model, layout, tokens, trains=trains),
    ]


def head_row(gpus: str, name: str, model: Model, layout: Layout, loss: str, *, trains: bool = True) -> list[str]:
    head = model.head(layout.tensor)
    of = sent_for_head(model, layout, loss=loss, trains=trains)
    forward = split_vocabulary(model.width, TOKENS, layout.tensor, loss, trains=False)
    inside, outside = wires(layout, of)
    return [
        gpus,
        name,
        str(layout),
        number((STATE if trains else LOW) * head / layout.shard / GIB),
        number((2 * LOW + WIDE if trains else 0) * head / GIB),
        number(forward / MIB),
        number((split_vocabulary(model.width, TOKENS, layout.tensor, loss, trains=trains) - forward) / MIB),
        number((inside - of.tensor) / MIB),
        number(outside / MIB),
        number(1e3 * inside / NVLINK),
        number(1e3 * outside / ADAPTER),
    ]


def number(x: float) -> str:
    """Three digits."""
    if x == 0:
        return "0"
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


COSTS = "NVLink GiB | adapter GiB | operations ms | NVLink ms | adapter ms | first limit"


def tables() -> dict[str, str]:
    """Every table of the page, by the name in its marker."""
    trained = f"GPUs | layout | state GiB | gathered GiB | kept GiB | {COSTS}"
    scored = f"GPUs | layout | state GiB | gathered GiB | {COSTS}"
    anywhere = f"{GPUS[0]} to {GPUS[-1]}"
    student = [row(str(n), STUDENT, Layout(1, NODE, n // NODE)) for n in GPUS]
    student += [row(str(n), STUDENT, Layout(1, n)) for n in (GPUS[3], GPUS[-1])]
    teacher = [
        row(anywhere, TEACHER, Layout(4), tokens=4 * TOKENS, trains=False),
        row(anywhere, TEACHER, Layout(1, NODE), trains=False),
        *(row(str(n), TEACHER, Layout(1, n), trains=False) for n in GPUS[1:]),
    ]
    large = [row(str(n), LARGE, Layout(NODE, n // NODE)) for n in GPUS]
    heads = [
        *(head_row(str(n), "0.6B", STUDENT, Layout(4, 2, n // NODE), "linear_forward_kl") for n in GPUS),
        head_row(anywhere, "14B, scores", TEACHER, Layout(4), "linear_token_logprobs", trains=False),
        head_row(anywhere, "70B, scores", LARGE, Layout(NODE), "linear_token_logprobs", trains=False),
        *(head_row(str(n), "70B", LARGE, Layout(NODE, n // NODE), "fused_linear_loss") for n in GPUS),
    ]
    of_heads = (
        "GPUs | head | layout | state GiB | gathered GiB | forward MiB | dH MiB | NVLink, weights MiB "
        "| adapter, weights MiB | NVLink ms | adapter ms"
    )
    return {
        "student": table(trained.split(" | "), student),
        "teacher": table(scored.split(" | "), teacher),
        "70B": table(trained.split(" | "), large),
        "heads": table(of_heads.split(" | "), heads),
    }


def updated(page: str) -> str:
    """The page with its tables made anew."""
    return with_tables(page, tables())


def main() -> int:
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
