"""Hugging Face models on packed rows: a check that the sequences of a row do not see each other.

    kdloss.integrations.transformers.check_packed(model)  # once, before training on packed rows

A model that mixes the sequences of a row raises no error, and its loss looks healthy. Nothing here imports
transformers: the model is only called.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from kdloss import _checks

# The bound is a share of the distance from each sequence alone to all of them run as one sequence. Rounding moved
# log-probs of SmolLM2-135M (30 layers, 101 tokens, V = 49152) by 3e-6 of that distance in float32, by 0.004 in float16
# (whose mantissa TF32 has) and by 0.04 in bfloat16. In a random Mixtral in float16 it reached 0.09: tokens went to
# other experts. The smallest leak seen, through the convolutions of a random LFM2, was 1.7e-4.
_SHARE, _SHARE_16_BIT = 1 / 20000, 1 / 8
_RESOLVED = 1e-4  # nats


def check_packed(model: torch.nn.Module, *, lengths: Iterable[int] = (5, 7)) -> float:
    """Check that a causal model, run on one packed row, gives each sequence the log-probs that it has alone.

        max over t and v of |log q(v | packed row, position t) - log q(v | its sequence alone, same token)|

    The model runs on random token ids of its vocabulary, in three ways:

    - packed: `model(input_ids=(1, T), position_ids=(1, T), use_cache=False)`. The `position_ids` restart at 0 in every
      sequence, and there is no attention mask.
    - alone: `model(input_ids=(1, L), use_cache=False)` for each sequence.
    - joined: the row as one sequence, `model(input_ids=(1, T), use_cache=False)`. Its largest difference from alone is
      how far log-probs move when sequences see each other. The bound is a share of that, so it fits models of any size.

    The model runs in eval mode without gradients, and afterwards every module has its mode back. The global random
    state is not used. Every rank of a sharded model must call this.

    Args:
        model: a causal language model of transformers, or another module that is called as above and returns logits
            (1, T, V), or an output with `.logits`. PEFT, FSDP or `torch.compile` may wrap it. To check another way of
            calling a model, pass a module whose `forward(input_ids, position_ids=None, use_cache=None)` calls it so. If
            its forward enters autocast and returns float32, as after `Accelerator.prepare`, pass the model from before.
        lengths: the lengths of two or more sequences, each >= 1, tokens. To test a sliding window, make some longer
            than the window.

    Returns:
        The largest difference of log-probs over all positions and the whole vocabulary, nats.

    Raises:
        TypeError: `model` is not a module or returns no logits, or `lengths` are not ints.
        ValueError: the difference is above the bound. In float32 the bound is 1/20000 of the joined difference;
            rounding reached 1/300000. It is 1/8 where parameters or logits have 16 bits, and under autocast or TF32;
            rounding reached 1/25 in bfloat16, and 1/11 where it sent tokens to other experts. Without `position_ids`,
            with a cache or with a mask of ones, the difference is about as large as the joined one. It may be below 1/8
            where only convolutions or recurrent states run on into the next sequence: check a hybrid model in float32.
        ValueError: log-probs are NaN, or the joined difference is below 1e-4 nats, as with a head of zeros. The check
            then cannot tell.
        ValueError: `lengths` has fewer than two entries or one < 1, or logits have the wrong shape.

    Example:
        >>> import torch, transformers
        >>> from kdloss.integrations.transformers import check_packed
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = transformers.LlamaConfig(**size, num_attention_heads=2)
        >>> check_packed(transformers.LlamaForCausalLM(config)) < 1e-4
        True
    """
    sizes = _sizes(lengths)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            packed, alone, joined, is_float32 = _three_ways(model, sizes)
    finally:
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode
    off, far = _distance(packed, alone), _distance(joined, alone)
    if off != off or far != far:
        raise ValueError("log-probs of the model are NaN")
    if far < _RESOLVED:
        raise ValueError(
            "cannot tell whether the sequences of a packed row see each other: where the row is run as one sequence, "
            f"its log-probs are within {far:.1e} nats of those of each sequence alone. A head of zeros does that; pass "
            "a model with random or trained weights"
        )
    share = _SHARE if is_float32 else _SHARE_16_BIT
    if not off <= share * far < float("inf"):
        raise ValueError(
            f"log-probs of a packed row are up to {off:.3g} nats from those of each sequence alone. The bound is "
            f"{share * far:.3g}, 1/{1 / share:.0f} of the {far:.3g} nats where the row is run as one sequence. A "
            "packed row needs position_ids that restart at every sequence, use_cache=False and no attention_mask. If "
            "the model got these, load it with another attn_implementation, or run padded rows and use kdloss.pack"
        )
    return off


def _sizes(lengths: Iterable[int]) -> list[int]:
    try:
        sizes = [operator.index(n) for n in lengths]
    except TypeError:
        raise TypeError(f"lengths must be ints, one per sequence, got {lengths!r}") from None
    if len(sizes) < 2:
        raise ValueError(f"lengths must have two or more entries, one per sequence, got {sizes}")
    if min(sizes) < 1:
        raise ValueError(f"lengths must be >= 1, got {sizes}")
    return sizes


def _three_ways(model: torch.nn.Module, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Log-probs (1, T, V) of the packed row, of each sequence alone and of all as one; whether they are float32's."""
    parameters = [p for p in model.parameters() if p.is_floating_point() and p.device.type != "meta"]  # meta: offloaded
    device = parameters[0].device if parameters else torch.device("cpu")
    probe = _logits(model, torch.zeros(1, 1, dtype=torch.int64, device=device))  # for the size of the vocabulary
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(probe.shape[-1], (1, n), generator=generator).to(device) for n in sizes]
    position_ids = torch.cat([torch.arange(n, device=device) for n in sizes])[None]
    row = torch.cat(rows, 1)
    packed = _logits(model, row, position_ids=position_ids)
    alone = torch.cat([_logits(model, x) for x in rows], 1)
    joined = _logits(model, row)
    is_float32 = all(x.dtype.itemsize >= 4 for x in (probe, *parameters)) and _multiplies_in_float32(device)
    dtype = _checks.accumulator_dtype(probe)
    packed, alone, joined = (x.to(dtype).log_softmax(-1) for x in (packed, alone, joined))
    return packed, alone, joined, is_float32


def _multiplies_in_float32(device: torch.device) -> bool:
    """False under autocast or TF32, which round 1 + 2**-12 to 1. How to ask torch for either depends on its version."""
    x = torch.full((256, 256), 1 + 2**-12, device=device)
    return bool((x @ torch.eye(256, device=device) == x).all())


def _logits(model: torch.nn.Module, input_ids: Tensor, **keywords: Tensor) -> Tensor:
    output = model(input_ids=input_ids, use_cache=False, **keywords)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits, or an output with .logits, got {type(output).__name__}")
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(f"logits must be (1, {input_ids.shape[1]}, V), got {tuple(logits.shape)}")
    return logits


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest |x - y|. Where both are -inf, as of a token that the model excludes, the distance is 0; NaN stays."""
    return float(torch.where(x == y, 0.0, (x - y).abs()).max())
