"""Runs kernels on a GPU if there is one, else in the interpreter on the CPU (see `conftest.py`).

A test calls a launcher, or a public function with `impl="triton"`, on tensors of `DEVICE`, inside `poisoned()`.
`benchmarks.kernel_costs` compiles launches for sm_90.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it `poisoned` forbids matrix products


@functools.cache
def _languages(function: Callable[..., Any]) -> list[Any]:
    """The modules of Triton's language that a kernel refers to."""
    return [module for module in (tl, tl.core) if any(x is module for x in function.__globals__.values())]


def _patched_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter patches the language at a launch, and again at every call of one kernel by another.

    The second patch finds everything replaced already, and costs more than the call itself. It is left out here.
    """

    def patched(function: Callable[..., Any]) -> Any:
        if all(module.range.__name__ == "_new_range" for module in _languages(function)):
            return interpreter._LangPatchScope()
        return patch(function)

    return patched


def _equal_shapes_first(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Triton compares a tuple with a list, so it also broadcasts two blocks of one shape, to that shape."""

    def broadcast_unless_equal(semantic: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape:
            return lhs, rhs
        return broadcast(semantic, lhs, rhs)

    return broadcast_unless_equal


def _kept_by_name(np_dtype: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """The interpreter builds a table of all dtypes to look one up, several times an operation."""
    known: dict[str, np.dtype] = {}

    def kept(dtype: Any) -> np.dtype:
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    return kept


# Most of the interpreter's time goes into the operations below; none of them changes a result.
interpreter._patch_lang = _patched_once(interpreter._patch_lang)
interpreter._get_np_dtype = _kept_by_name(interpreter._get_np_dtype)
TritonSemantic.broadcast_impl_value = _equal_shapes_first(TritonSemantic.broadcast_impl_value)
# It repeats every sum of integers in 64 bits to assert that the sum did not overflow, and asserts only with `debug`.
if not interpreter.interpreter_builder.options.debug:
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Newly allocated memory holds NaN, or the largest integer, so elements that a kernel does not write are seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.empty(3, device=DEVICE).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype)


def amid_nan(rows: Tensor, offset: int, gap: int = 0) -> Tensor:
    """A copy of (n, V) that begins at any element of memory, where all else is NaN and which ends with the last row."""
    n, columns = rows.shape
    size = (n - 1) * (columns + gap) + columns
    space = torch.full((16 + offset + size,), torch.nan, dtype=rows.dtype, device=rows.device)
    return space.as_strided((n, columns), (columns + gap, 1), 16 + offset).copy_(rows)


def far_apart(rows: Tensor, stride: int) -> Tensor:
    """A copy of (n, V) whose rows lie `stride` elements apart, in mapped memory that is mostly never touched."""
    n, columns = rows.shape
    if DEVICE == "cuda":
        space = torch.empty((n - 1) * stride + columns, dtype=rows.dtype, device=DEVICE)
    else:
        size = ((n - 1) * stride + columns) * rows.element_size()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        space = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=rows.dtype)
    out = space.as_strided((n, columns), (stride, 1))
    return out.copy_(rows)
