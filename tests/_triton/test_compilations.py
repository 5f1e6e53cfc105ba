"""Holds that kernels are compiled once for a model, not once for a shape: batches differ in tokens, labels and padding.

Triton compiles again if a number has another type (from 2^31 on), is divisible by 16 or not, or is 1. Few and many rows
have different launch parameters, labels are examined in blocks of powers of two, and the first and the last slice have
code of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks import kernel_costs
from benchmarks.kernel_costs import ROOT, Call


def calls() -> Iterator[Call]:
    """Rows of odd and even vocabularies, also past 2^31 elements; several labels; the sequences of a batch."""
    import torch

    import kdloss

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    def call(function: Any, *inputs: Any, **options: Any) -> Call:
        def run() -> None:
            out = function(*inputs, impl="triton", **options)
            sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()

        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        return Call(f"{function.__name__}, {shapes}, {options}", run, tested=True)

    def labels(*shape: int) -> Any:
        return new(*shape, dtype=torch.int64)

    for rows, vocab in ((3000, 151936), (4096, 151936), (20011, 151936), (2, 151936), (33, 151936), (50, 151936)):
        options = {"vocab_size": vocab - rows % 7}
        yield call(kdloss.token_logprobs_and_entropy, new(rows, vocab), labels(rows, 9 + rows % 8), **options)
    for rows in (3001, 4096, 20011):
        yield call(kdloss.token_logprobs_and_entropy, new(rows, 128257), labels(rows, 16))
    for tokens in (3000, 8192, 20011):
        hidden, weight, columns = new(tokens, 1024), new(151936, 1024), labels(tokens, 9 + tokens % 8)
        options = {"vocab_size": 151669 + tokens % 3}
        yield call(kdloss.linear_token_logprobs, hidden, weight, columns, **options)
        yield call(kdloss.linear_token_logprobs, hidden, weight, columns, max_trained_tokens=tokens // 3, **options)
    for rows in (3000, 8191, 20011):
        x, options = new(rows, 151936), {"vocab_size": 151936 - rows % 5}
        yield call(kdloss.generalized_jsd, x, x, beta=0.3, **options)
    for rows, vocab in ((3000, 151936), (20011, 151936), (3001, 128257), (20011, 128257), (2, 151936), (33, 151936)):
        k, options = 100 + rows % 29, {"vocab_size": vocab - 1 - rows % 5}
        teacher = new(rows, k, dtype=torch.float32), labels(rows, k)
        yield call(kdloss.topk_forward_kl, new(rows, vocab), *teacher, tail="bucket", **options)


def main() -> None:
    codes: Counter[str] = Counter()
    for call, launches in kernel_costs.record(calls()).first.items():
        codes.update(f"{call.split(',')[0]}: {launch.name}" for launch in launches)
    print(json.dumps(codes))


def test_shapes_share_their_code():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    command = [sys.executable, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "token_logprobs_and_entropy: forward_kernel": 2,  # many rows, few rows; whatever the vocabulary
        "token_logprobs_and_entropy: merge_kernel": 1,
        "token_logprobs_and_entropy: backward_kernel": 2,
        "linear_token_logprobs: order_kernel": 1,
        "linear_token_logprobs: take_kernel": 1,
        "linear_token_logprobs: fold_kernel": 3,  # the first slice, the last, and those in between
        "linear_token_logprobs: gradient_kernel": 1,
        "linear_token_logprobs: put_back_kernel": 1,
        "generalized_jsd: state_kernel": 1,
        "generalized_jsd: mixture_kernel": 1,
        "generalized_jsd: divergence_gradient_kernel": 1,
        "topk_forward_kl: kept_and_rest_kernel": 2,
        "topk_forward_kl: finish_kernel": 1,
        "topk_forward_kl: state_kernel": 1,
        "topk_forward_kl: divergence_gradient_kernel": 1,
        "topk_forward_kl: kept_and_rest_backward_kernel": 2,
    }


if __name__ == "__main__":
    main()
