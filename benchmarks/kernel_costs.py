"""`python -m benchmarks.kernel_costs`: what each kernel costs per logit, read off its sm_90 code. Needs no GPU.

    python -m benchmarks.kernel_costs                 the tables, with the peers that are installed (`peers.txt`)
    python -m benchmarks.kernel_costs --write         writes them to docs/kernels.md, and all costs for the tests
    python -m benchmarks.kernel_costs --every         all calls, some 1000 codes: costs, one JSON a line

`calls` calls every public function that has kernels, on the meta device, and the launches are compiled (`sm90.py`). One
trip of the loop along the vocabulary, divided by the logits that a thread handles in it, gives the costs per logit, or
per pair of logits of student and teacher:

    bytes        read and written, if each logit is moved once
    access       bytes of the narrowest load or store of the loop
    issue        time to issue the instructions / time to move the bytes:
                 max(instructions / 128, special / 16) / (132 * 1.755e9)  over  bytes / 4.3e12
    bandwidth    min(1, 1 / issue): the share of the bandwidth that is left if nothing but these two takes time

An H200 has 132 multiprocessors of 4 schedulers, each of which issues one instruction for 32 threads in a cycle, at
1.755 GHz under load, and 16 units for special functions; it copies 4.3 TB/s. The model knows nothing of latency, of the
ends of rows, and of narrow accesses, which load the memory pipeline beyond their instructions.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import itertools
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints
from unittest import mock

from . import sm90
from .report import table, with_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
RECORDED = ROOT / "tests" / "_triton" / "kernel_costs.json"

LANES = 128  # instructions of a thread that a multiprocessor issues in a cycle
SPECIAL = 16  # of these, special functions
CYCLES = 132 * 1.755e9  # of all multiprocessors in a second
BANDWIDTH = 4.3e12

# Arguments that a kernel reads and writes along the vocabulary; each None is skipped.
BOTH = ("x", "y", "bias", "teacher_bias")
Streams = tuple[tuple[str, ...], tuple[str, ...]]
STREAMS: dict[str, Streams] = {
    "forward_kernel": (("logits",), ()),
    "backward_kernel": (("logits",), ("gradient",)),
    "fold_kernel": (("x", "bias"), ()),
    "gradient_kernel": (("x", "bias"), ("out",)),
    "state_kernel": (BOTH, ()),
    "mixture_kernel": (BOTH, ()),
    "divergence_gradient_kernel": (BOTH, ("out",)),
    "kept_and_rest_kernel": (("logits",), ()),
    "kept_and_rest_backward_kernel": (("logits",), ("gradient",)),
}
# These handle a few values per row, or rows of hidden states.
SMALL = {
    "merge_kernel",
    "pair_merge_kernel",
    "pair_sum_kernel",
    "finish_kernel",
    "order_kernel",
    "take_kernel",
    "put_back_kernel",
}

MOST_REGISTERS = 128  # of a thread: 512 threads fit a multiprocessor
ROWS, FEW = 8192, 32
EVEN, ODD, PADDED = 151936, 128257, 151669
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.3},
    "skewed_reverse_kl": {"alpha": 0.3},
}


class Call(NamedTuple):
    """A call of a public function."""

    name: str  # the function, the dtype, the layout, options
    run: Callable[[], Any]
    tested: bool  # by every run of the tests; the others by `--every`


def calls() -> Iterator[Call]:
    """Calls of every public function that has kernels: all layouts and options that decide a kernel's code.

    Each option is set alone and together with all others, for every dtype and for rows of any layout; labels by the
    sizes of their blocks.
    """
    yield from _logits_calls()
    yield from _linear_calls()
    yield from _divergence_calls()
    yield from _topk_calls()


# --- the calls -----------------------------------------------------------------------------------------------------


def _new(*shape: int, dtype: str = "float32", grad: bool = False) -> Any:
    import torch

    return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta", requires_grad=grad)


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]


def _rows(layout: str, dtype: str, rows: int = ROWS) -> tuple[Any, dict[str, int]]:
    """(logits, `vocab_size` where it is not their width)."""
    if layout == "even":
        return _new(rows, EVEN, dtype=dtype, grad=True), {}
    if layout == "odd":
        return _new(rows, ODD, dtype=dtype, grad=True), {}
    if layout == "padded":
        return _new(rows, EVEN, dtype=dtype, grad=True), {"vocab_size": PADDED}
    if layout == "cut":
        return _new(rows, EVEN, dtype=dtype, grad=True)[:, :PADDED], {}
    return _new(EVEN, rows, dtype=dtype, grad=True).T, {}


def _labels(rows: int, count: int = 1) -> Any:
    return _new(rows, count, dtype="int64") if count > 1 else _new(rows, dtype="int64")


def _backward(out: Any) -> None:
    import torch

    sum(x.sum() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)).backward()  # type: ignore[union-attr]


def _shard(width: int) -> Any:
    import kdloss

    return kdloss.VocabShard(0, width)


def _logits_calls() -> Iterator[Call]:
    import kdloss

    def call(
        name: str, dtype: str, layout: str, *, tested: bool, rows: int = ROWS, labels: int = 1, **given: Any
    ) -> Call:
        function = getattr(kdloss, name)
        only = given.pop("only", None)
        what = ", ".join(("few rows", *given) if rows == FEW else given)
        label = ", ".join(filter(None, (name, _short(dtype), layout, what, f"{labels} labels" if labels > 1 else "")))

        def run() -> None:
            logits, options = _rows(layout, dtype, rows)
            if given.get("temperature"):
                options["temperature"] = _new(rows)
            if given.get("softcap"):
                options["softcap"] = 30.0  # type: ignore[assignment]
            if given.get("shard"):
                options["shard"] = _shard(logits.shape[1])
            out = function(logits, _labels(rows, labels), impl="triton", **options)
            _backward(getattr(out, only) if only else out)

        return Call(label + (f", {only} alone" if only else ""), run, tested)

    one, two = "token_logprobs", "token_logprobs_and_entropy"
    every = {"temperature": True, "softcap": True, "shard": True}
    for dtype, layout, name in itertools.product(
        ("bfloat16", "float32", "float16"), ("even", "odd", "padded", "cut", "apart"), (one, two)
    ):
        half = dtype == "bfloat16"
        plain = layout in ("even", "odd")
        cut = layout == "cut"  # rows of the gradient begin at other offsets from multiples of 16 bytes
        yield call(
            name,
            dtype,
            layout,
            tested=(half and (plain or cut)) or (dtype == "float32" and layout == "even" and name == two),
        )
        yield call(name, dtype, layout, tested=False, labels=8)
        yield call(name, dtype, layout, tested=False, temperature=True)
        yield call(name, dtype, layout, tested=half and layout == "even" and name == one, softcap=True)
        yield call(name, dtype, layout, tested=half and layout == "even" and name == two, shard=True)
        yield call(name, dtype, layout, tested=half and layout == "odd" and name == two, labels=64, **every)
        yield call(name, dtype, layout, tested=False, labels=300, **every)
        yield call(name, dtype, layout, tested=half and layout == "odd" and name == two, rows=FEW)
        yield call(name, dtype, layout, tested=False, rows=FEW, labels=64, **every)
    for layout in ("cut", "apart"):  # the gradient of the entropy alone, in the layouts that the lines above leave out
        yield call(two, "bfloat16", layout, tested=True, only="entropy")


def _linear_calls() -> Iterator[Call]:
    import kdloss

    def call(
        name: str, dtype: str, vocab: int, *, tested: bool, tokens: int = ROWS, labels: int = 1, **given: Any
    ) -> Call:
        what = ", ".join(given)
        width = "even" if vocab == EVEN else "odd"
        few = "" if tokens == ROWS else f"{tokens} tokens"
        label = ", ".join(
            filter(None, (name, _short(dtype), width, few, what, f"{labels} labels" if labels > 1 else ""))
        )

        def run() -> None:
            hidden, weight = _new(tokens, 1024, dtype=dtype, grad=True), _new(vocab, 1024, dtype=dtype, grad=True)
            options: dict[str, Any] = {}
            if given.get("options"):
                bias = _new(vocab, dtype=dtype, grad=True)
                options |= {"bias": bias, "temperature": _new(tokens), "softcap": 30.0, "logit_scale": 1.3}
            if given.get("bound"):
                options["max_trained_tokens"] = 500
            if given.get("shard"):
                options["shard"] = _shard(vocab)
            inputs = [hidden, weight, _labels(tokens, labels)]
            if name == "fused_linear_loss":
                inputs.append(lambda logp, entropy: -logp - entropy)
                options["loss_mask"] = _new(tokens, dtype="bool")
            out = getattr(kdloss, name)(*inputs, impl="triton", **options)
            _backward(out.loss if name == "fused_linear_loss" else out)

        return Call(label, run, tested)

    one, two, fused = "linear_token_logprobs", "linear_token_logprobs_and_entropy", "fused_linear_loss"
    for dtype, vocab, name in itertools.product(("bfloat16", "float32", "float16"), (EVEN, ODD), (one, two, fused)):
        half = dtype == "bfloat16"
        yield call(name, dtype, vocab, tested=vocab == EVEN and (half or (dtype == "float32" and name == two)))
        yield call(name, dtype, vocab, tested=half and name == two and vocab == ODD, options=True)
        yield call(name, dtype, vocab, tested=False, shard=True)
        yield call(name, dtype, vocab, tested=False, tokens=512)  # logits are kept
        yield call(name, dtype, vocab, tested=half and vocab == EVEN and name == one, bound=True)
        if name != fused:
            yield call(
                name, dtype, vocab, tested=half and vocab == EVEN and name == two, labels=64, shard=True, options=True
            )
            yield call(name, dtype, vocab, tested=False, labels=300, tokens=512, options=True)


def _divergence_calls() -> Iterator[Call]:
    import kdloss

    def call(name: str, dtypes: tuple[str, str], layout: str, *, tested: bool, rows: int = ROWS, **given: Any) -> Call:
        kinds = _short(dtypes[0]) if dtypes[0] == dtypes[1] else " + ".join(map(_short, dtypes))
        label = ", ".join((name, kinds, layout, *(("few rows",) if rows == FEW else ()), *given))

        def run() -> None:
            x, options = _rows(layout, dtypes[0], rows)
            # beside rows that were cut, those of a teacher begin at other offsets from multiples of 16 bytes
            y = _new(rows, PADDED, dtype=dtypes[1]) if layout == "cut" else _rows(layout, dtypes[1], rows)[0]
            if given.get("temperature"):
                options["temperature"] = _new(rows)
            if given.get("shard"):
                options["shard"] = _shard(x.shape[1])
            _backward(getattr(kdloss, name)(x, y, impl="triton", **DIVERGENCES[name], **options))

        return Call(label, run, tested)

    def linear(name: str, dtype: str, vocab: int, *, tested: bool, **given: Any) -> Call:
        label = ", ".join((f"linear_{name}", _short(dtype), "even" if vocab == EVEN else "odd", *given))

        def run() -> None:
            tensors = [_new(n, 1024, dtype=dtype, grad=True) for n in (ROWS, vocab) * 2]
            options: dict[str, Any] = {"loss_mask": _new(ROWS, dtype="bool")}
            if given.get("options"):
                options |= {"softcap": 30.0, "teacher_softcap": 30.0, "logit_scale": 1.3, "teacher_logit_scale": 1.3}
                bias, teacher_bias = _new(vocab, dtype=dtype, grad=True), _new(vocab, dtype=dtype)
                options |= {"bias": bias, "teacher_bias": teacher_bias, "temperature": _new(ROWS)}
            if given.get("shard"):
                options["shard"] = _shard(vocab)
            function = getattr(kdloss, f"linear_{name}")
            _backward(function(*tensors, impl="triton", **DIVERGENCES[name], **options))

        return Call(label, run, tested)

    dtypes = ("bfloat16", "float32", "float16")
    # the skewed KLs differ from the JSD in a few instructions
    tested = {*itertools.product(("forward_kl", "reverse_kl", "generalized_jsd"), ("even", "odd"))}
    tested |= {("skewed_reverse_kl", "even"), ("forward_kl", "cut"), ("generalized_jsd", "cut")}
    for name, pair, layout in itertools.product(DIVERGENCES, itertools.product(dtypes, dtypes), ("even", "odd", "cut")):
        half = pair == ("bfloat16", "bfloat16")
        yield call(name, pair, layout, tested=half and (name, layout) in tested)
        yield call(name, pair, layout, tested=False, temperature=True)
        yield call(name, pair, layout, tested=half and (name, layout) == ("generalized_jsd", "even"), shard=True)
        yield call(name, pair, layout, tested=False, rows=FEW, shard=True)
        yield call(name, pair, layout, tested=False, rows=FEW)
    mixed = ("bfloat16", "float32")
    yield call("generalized_jsd", mixed, "padded", tested=True)
    for name, dtype, vocab in itertools.product(DIVERGENCES, dtypes, (EVEN, ODD)):
        half = dtype == "bfloat16"
        yield linear(name, dtype, vocab, tested=half and vocab == EVEN and name == "generalized_jsd")
        yield linear(
            name,
            dtype,
            vocab,
            tested=half and vocab == ODD and name == "skewed_reverse_kl",
            options=True,
        )
        yield linear(name, dtype, vocab, tested=False, options=True, shard=True)


def _samples() -> tuple[Any, Any]:
    """Labels, and the teacher's log-probs of them."""
    return _new(ROWS, dtype="int64"), _new(ROWS)


def _support() -> tuple[Any, Any]:
    """The teacher's log-probs of the top 64, and their ids."""
    return _new(ROWS, 64), _new(ROWS, 64, dtype="int64")


def _topk_calls() -> Iterator[Call]:
    import kdloss

    def call(
        form: str, tail: str, dtype: str, layout: str, *, tested: bool, rows: int = ROWS, k: int = 64, **given: Any
    ) -> Call:
        name = f"topk_{form}"
        few = ("few rows",) if rows == FEW else ()
        label = ", ".join((name, _short(dtype), layout, tail, *few, *(() if k == 64 else (f"K = {k}",)), *given))

        def run() -> None:
            logits, options = _rows(layout, dtype, rows)
            if given.get("temperature"):
                options["temperature"] = _new(rows)
            if given.get("shard"):
                options["shard"] = _shard(logits.shape[1])
            teacher = _new(rows, k), _new(rows, k, dtype="int64")
            more = DIVERGENCES[form] | options
            _backward(getattr(kdloss, name)(logits, *teacher, tail=tail, impl="triton", **more))

        return Call(label, run, tested)

    def sampled(dtype: str, layout: str) -> Call:
        def run() -> None:
            logits, options = _rows(layout, dtype)
            given: dict[str, Any] = {"impl": "triton"} | options
            _backward(kdloss.topk_sampled_reverse_kl(logits, *_samples(), *_support(), **given))

        return Call(f"topk_sampled_reverse_kl, {_short(dtype)}, {layout}", run, False)

    def linear(name: str, dtype: str, vocab: int) -> Call:
        def run() -> None:
            hidden, weight = (_new(n, 1024, dtype=dtype, grad=True) for n in (ROWS, vocab))
            options: dict[str, Any] = {"loss_mask": _new(ROWS, dtype="bool"), "impl": "triton"}
            given: tuple[Any, ...] = _support()
            if name == "sampled_reverse_kl":
                given = (*_samples(), *given)
            else:
                options |= {"tail": "bucket"} | DIVERGENCES[name]
            _backward(getattr(kdloss, f"linear_topk_{name}")(hidden, weight, *given, **options))

        return Call(f"linear_topk_{name}, {_short(dtype)}, {'even' if vocab == EVEN else 'odd'}", run, False)

    # the kernels of log-probs, of products and of the top-k from logits, whose codes are tested there
    for dtype, (layout, vocab) in itertools.product(("bfloat16", "float32"), (("even", EVEN), ("odd", ODD))):
        yield sampled(dtype, layout)
        for form in ("forward_kl", "reverse_kl", "generalized_jsd", "sampled_reverse_kl"):
            yield linear(form, dtype, vocab)

    layouts = ("even", "odd", "padded", "cut", "apart")
    for dtype, layout in itertools.product(("bfloat16", "float32", "float16"), layouts):
        half, even, odd = dtype == "bfloat16", layout == "even", layout == "odd"
        plain = ("even", "odd", "cut")
        yield call(
            "forward_kl", "bucket", dtype, layout, tested=(half and layout in plain) or (dtype == "float32" and even)
        )
        yield call("forward_kl", "bucket", dtype, layout, tested=False, temperature=True)
        yield call("forward_kl", "bucket", dtype, layout, tested=half and odd, rows=FEW, temperature=True, k=300)
        yield call("reverse_kl", "renormalize", dtype, layout, tested=half and even)
        yield call("generalized_jsd", "bucket", dtype, layout, tested=False, k=300)
        yield call("generalized_jsd", "truncate", dtype, layout, tested=False, k=8)
        yield call("forward_kl", "bucket", dtype, layout, tested=False, shard=True)


# --- launches ------------------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """Launches of calls."""

    first: dict[str, list[sm90.Launch]]  # call: the launches whose code no call before it has
    kernels: set[str]  # that the package defines


def record(some: Iterable[Call]) -> Recorded:
    """Make the calls, in a process that has not imported `kdloss`. `some` may import it as it goes."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled; unset it")
    if "kdloss" in sys.modules:
        raise RuntimeError("kdloss is imported already; record() prepares its operators for the meta device first")
    import torch
    import torch.distributed as dist
    import torch.fx.experimental._config as fx

    with mock.patch("torch.library.register_fake"):  # so that operators run on the meta device, too
        import kdloss
    import kdloss._triton
    from kdloss._distributed import sharded_inputs
    from kdloss._softmax import backend

    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    first = {}
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(backend, "_obstacle", return_value=None))
            stack.enter_context(mock.patch.object(sharded_inputs, "check_backend"))
            stack.enter_context(mock.patch.object(fx, "meta_nonzero_assume_all_nonzero", True))
            launches = stack.enter_context(sm90.recording())
            for call in some:
                before = len(launches)
                call.run()
                first[call.name] = launches[before:]
    finally:
        dist.destroy_process_group()
    names = [f"kdloss._triton.{module.name}" for module in pkgutil.iter_modules(kdloss._triton.__path__)]
    return Recorded(first, sm90.functions_launched(map(importlib.import_module, names)))


def functions_without_call() -> set[str]:
    """Public functions whose `impl` may be "triton" and that are not in `calls`."""
    import kdloss

    public = {name: getattr(kdloss, name) for name in kdloss.__all__}
    having = {name: x for name, x in public.items() if "impl" in _parameters(x)}
    with_kernels = {name for name, x in having.items() if "triton" in get_args(get_type_hints(x)["impl"])}
    return with_kernels - {call.name.split(",")[0] for call in calls()}


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) if inspect.isfunction(function) else set()


# --- costs ---------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a kernel costs per logit, or per pair of logits. A small kernel has registers and spills alone."""

    kernel: str
    call: str
    grid: list[int]
    registers: int
    spilled_bytes: int
    trips: int = 0  # tiles that a trip of the loop handles
    read: int = 0  # bytes
    written: int = 0
    narrowest: int = 0  # bytes of an access
    instructions: float = 0
    special: float = 0

    @property
    def key(self) -> str:
        return f"{self.kernel}: {self.call}"

    @property
    def issue(self) -> float:
        """Time to issue the instructions / time to move the bytes."""
        return max(self.instructions / LANES, self.special / SPECIAL) / CYCLES * BANDWIDTH / (self.read + self.written)


def costs(recorded: Recorded, *, every: bool = False) -> Iterator[Cost]:
    """Of the codes that the calls launch. Unless `every`: of several codes of one kernel in a call the first."""
    pairs = []
    for call, launches in recorded.first.items():
        names = [launch.name for launch in launches]
        pairs += [(call, launch) for i, launch in enumerate(launches) if every or launch.name not in names[:i]]
    for start in range(0, len(pairs), 100):
        some = pairs[start : start + 100]
        for (call, _), code in zip(some, sm90.codes([launch for _, launch in some]), strict=True):
            yield _cost(call, code)


def _cost(call: str, code: sm90.Code) -> Cost:
    launch = code.launch
    base = Cost(launch.name, call, list(launch.grid), code.registers, code.spilled_bytes)
    if launch.name in SMALL:
        return base
    tile = launch.arguments.get("block") or launch.arguments["lanes"] * launch.arguments["width"]
    found = _per_logit(base, code, tile, STREAMS[launch.name])
    return max(found, key=lambda cost: cost.instructions)


def _per_logit(base: Cost, code: sm90.Code, tile: int, names: Streams, *, passes: bool = False) -> list[Cost]:
    """The costs of the loops along the vocabulary; with `passes`, also of those that only read, if others write."""
    launch, out = code.launch, []
    read, write = ([n for n in map(launch.itemsize, some) if n] for some in names)
    each = tile / launch.threads  # logits of a thread
    lanes = launch.arguments.get("lanes", tile)
    for loop in code.along(tile, lanes, each * sum(read), 0 if passes else each * sum(write)):
        written = sum(write) if loop.stores else 0
        logits = each
        # ptxas may put several tiles into a trip; rows that are shifted in registers are loaded twice, the others once
        trips = max(1, int((loop.written / written if written else loop.read / sum(read)) / logits + 0.2))
        logits *= trips
        cost = base._replace(
            trips=trips,
            read=sum(read),
            written=written,
            narrowest=loop.narrowest(logits * sum(read), logits * written, logits * min(read + write)),
            instructions=round(loop.instructions / logits, 1),
            special=round(loop.special / logits, 2),
        )
        out.append(cost)
    return out


# --- peers ---------------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """A kernel of another package. Without a tile it multiplies hidden states with the head, and only spills count."""

    package: str
    kernel: str
    what: str
    run: Callable[[int], Any]  # launches it for a vocabulary
    tile: str = ""  # the argument
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _logits(vocab: int) -> Any:
    """On the CPU, since some peers look at values. Kernels are not run."""
    import torch

    return torch.zeros(1, 5, vocab, dtype=torch.bfloat16, requires_grad=True)


def _trl(vocab: int) -> None:
    import torch

    function = _load("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    _backward(function(_logits(vocab)[0], torch.zeros(5, dtype=torch.int64)))


def _liger_cross_entropy(vocab: int) -> None:
    import torch

    function = _load("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")
    labels = torch.zeros(5, dtype=torch.int64)
    function.apply(_logits(vocab)[0], labels, None, -100, 0.0, 0.0, "none", None, False)


def _liger_grpo(vocab: int) -> None:
    import torch

    function = _load("liger_kernel.ops.grpo_loss", "GrpoLossFunction")
    ids, mask = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
    options = {"loss_type": "grpo", "reduce": False}
    inputs = [*inspect.signature(function.forward).parameters.values()][12:]
    given = [options.get(x.name, x.default) for x in inputs]
    found = function.apply(_logits(vocab), None, None, ids, torch.zeros(1), mask, 1.0, 0.0, 0.2, 0.2, False, *given)
    found[0].sum().backward()


def _cut_cross_entropy(vocab: int) -> None:
    import torch

    function = _load("cut_cross_entropy.cce_lse_forward", "cce_lse_forward_kernel")
    hidden, weight = (torch.zeros(n, 1024, dtype=torch.bfloat16) for n in (256, vocab))
    function(hidden, weight)


def _verl(vocab: int) -> None:
    import torch

    function = _load("verl.utils.kernel.kernels", "efficient_entropy_forward")
    hidden, weight = (torch.zeros(n, 1024, dtype=torch.bfloat16) for n in (256, vocab))
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        function(hidden, weight, torch.zeros(256, dtype=torch.int64), 2, 1.0, None)


PEERS = (
    Peer("trl", "_forward_kernel", "forward, entropy", _trl, "BLOCK_SIZE", ("logits_ptr",)),
    Peer("trl", "_backward_kernel", "backward, entropy", _trl, "BLOCK_SIZE", ("logits_ptr",), ("grad_logits_ptr",)),
    Peer(
        "liger-kernel",
        "liger_cross_entropy_kernel",
        "cross-entropy, forward and gradient",
        _liger_cross_entropy,
        "BLOCK_SIZE",
        ("X_ptr",),
        ("X_ptr",),
    ),
    Peer("liger-kernel", "_grpo_loss_fwd_kernel", "GRPO, forward", _liger_grpo, "BLOCK_N", ("LOGITS",)),
    Peer("liger-kernel", "_grpo_loss_bwd_kernel", "GRPO, backward", _liger_grpo, "BLOCK_N", ("LOGITS",), ("DLOGITS",)),
    Peer("cut-cross-entropy", "_cce_lse_forward_kernel", "from hidden states, forward", _cut_cross_entropy),
    Peer("verl", "efficient_entropy_kernel_general_mainloop", "from hidden states, forward", _verl),
)


def peers() -> dict[str, list[Cost]]:
    """{package: costs} of those that are installed."""
    out: dict[str, list[Cost]] = {}
    for peer, (layout, vocab) in itertools.product(PEERS, (("even", EVEN), ("odd", PADDED))):
        try:
            with sm90.recording() as launches:
                peer.run(vocab)
        except ModuleNotFoundError:
            continue
        (code,) = sm90.codes([launch for launch in launches if launch.name == peer.kernel])
        name = f"{peer.package} {importlib.metadata.version(peer.package)}"
        call = f"{peer.what}, bf16" + (f", {layout}" if peer.tile else "")
        base = Cost(name, call, [], code.registers, code.spilled_bytes)
        found = [base] if layout == "even" else []
        if peer.tile:
            tile = code.launch.arguments[peer.tile]
            found = _per_logit(base, code, tile, (peer.reads, peer.writes), passes=True)
        several = len(found) > 1
        found = [x._replace(call=f"{x.call}, pass {n}") if several else x for n, x in enumerate(found, 1)]
        out.setdefault(peer.package, []).extend(found)
    return out


# --- the page ------------------------------------------------------------------------------------------------------

# Calls whose kernels are on the page: one half-precision dtype, and no options but a softcap.
SHOWN = re.compile(r"(?!.*(shard|options|rows|labels|alone|bound|few|fp|reverse|skewed))")
COLUMNS = ("bytes", "access", "instructions", "special", "registers", "spilled", "issue", "bandwidth")


def stored() -> dict[str, Any]:
    """The costs that were recorded last: {"triton": its version, "costs": {key: cost}, "peers": {package: costs}}."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def updated(page: str, record: dict[str, Any]) -> str:
    """The page with the tables of a record."""
    ours = [Cost(**cost) for cost in record["costs"].values()]
    shown = [cost for cost in ours if cost.instructions and SHOWN.match(cost.call)]
    theirs = [Cost(**cost) for package in sorted(record["peers"]) for cost in record["peers"][package]]
    rows = {
        "costs": [(cost.kernel.removesuffix("_kernel"), cost.call.replace(", bf16", ""), cost) for cost in shown],
        "peers": [(cost.kernel, cost.call.replace(", bf16", ""), cost) for cost in theirs],
    }
    head = ("kernel", "call", *COLUMNS)
    return with_tables(page, {name: table(head, [(*of, *_cells(cost)) for *of, cost in rows[name]]) for name in rows})


def _cells(cost: Cost) -> list[str]:
    spills = [str(cost.registers), str(cost.spilled_bytes)]
    if not cost.instructions:
        return ["-", "-", "-", "-", *spills, "-", "-"]
    moved = f"{cost.read} + {cost.written}" if cost.written else str(cost.read)
    counts = [moved, f"{cost.narrowest} B", f"{cost.instructions:.1f}", f"{cost.special:.1f}"]
    return [*counts, *spills, f"{cost.issue:.2f}", f"{min(1, 1 / cost.issue):.0%}"]


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser("python -m benchmarks.kernel_costs", description="Costs of kernels per logit.")
    group = options.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="write docs/kernels.md and the costs that tests hold")
    group.add_argument("--json", action="store_true", help="print what the tests compare")
    group.add_argument("--every", action="store_true", help="print all calls; fails on a spill or too many registers")
    given = options.parse_args(arguments)
    recorded = record(call for call in calls() if given.every or call.tested)
    if given.every:
        failed = 0
        for cost in costs(recorded, every=True):
            failed += cost.spilled_bytes > 0 or cost.registers > MOST_REGISTERS
            print(json.dumps(cost._asdict()), flush=True)
        return int(failed > 0)
    found = list(costs(recorded))
    if given.json:
        unlaunched = recorded.kernels - {cost.kernel for cost in found}
        missing = {"functions": sorted(functions_without_call()), "kernels": sorted(unlaunched)}
        print(json.dumps({"costs": {cost.key: cost._asdict() for cost in found}, "missing": missing}))
        return 0
    theirs = {package: [cost._asdict() for cost in some] for package, some in peers().items()}
    now = {
        "triton": importlib.metadata.version("triton"),
        "costs": {cost.key: cost._asdict() for cost in found},
        "peers": stored()["peers"] | theirs,
    }
    if given.write:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), now), encoding="utf-8")
        text = re.sub(r"\n {3,}| +(?=\n)|(?<=\S)\n  (?=\})", "", json.dumps(now, indent=1))  # a cost a line
        RECORDED.write_text(text + "\n", encoding="utf-8")
    else:
        print(updated("".join(f"<!-- table: {name} -->\n<!-- end -->\n\n" for name in ("costs", "peers")), now))
    return 0


if __name__ == "__main__":
    sys.exit(main())
