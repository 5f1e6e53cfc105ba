"""The head of a module, as the functions of hidden states take it: plain tensors that carry the gradient.

A head is more than its weight: adapters add to it, FSDP2 splits it, models scale and cap its logits. A module that is
not known to be `hidden @ weight.T + bias` is compared with it on three rows, and refused where it differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdloss import _checks
from kdloss._distributed.fsdp import gathered, gradient_divisor

from .logit_transform import LogitTransform, logit_transform

# What every error of this file expects, and the way out that always works.
_MUST = "module must make its logits as hidden @ weight.T + bias"
_FROM_LOGITS = "take log-probs from the model's own logits with token_logprobs"


class OutputHead(NamedTuple):
    """A head, in the order in which the functions of hidden states apply it.

    Attributes:
        weight: (V, D), differentiable: the gradient reaches the parameters that make it, and every rank's gradient
            reaches the shards of FSDP2.
        bias: (V,), differentiable like `weight`. None: no bias.
        softcap: c > 0: logits become c * tanh(logits / c). None: no softcap.
        logit_scale: factor of the logits, before the softcap.

    Example:
        >>> import torch, kdloss
        >>> head: kdloss.OutputHead = kdloss.output_head(torch.nn.Linear(2, 3, bias=False))
        >>> head.weight.shape, head.bias, head.softcap, head.logit_scale
        (torch.Size([3, 2]), None, None, 1.0)
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def output_head(module: nn.Module) -> OutputHead:
    """The output head of a model, or of its head alone, with what adapts, shards, scales and caps it.

    logits = softcap(logit_scale * (hidden @ weight.T + bias))

    Call it after the model's forward, once for every backward: `weight` and `bias` are part of that graph.

    - A whole model of transformers, also inside PEFT, DDP or `torch.compile`: its head, and what its `forward` does to
      the logits. That `forward` runs once, with stand-ins for backbone and head, so that scale and softcap are measured
      and not guessed. A model with forward hooks is refused, because they may change its logits. `hidden` are the last
      hidden states of the backbone. A tied head is the weight of the embedding.
    - A head alone: a `torch.nn.Linear`, an embedding that is tied to the head, or any module with a `weight` and
      perhaps a `bias`. Scale and softcap of the model are unknown to it, so they are 1 and None. A module of another
      class, or with forward hooks, runs once on three rows, and is refused if it is not `hidden @ weight.T + bias`.
    - LoRA and DoRA of PEFT: the weight of the base with its active adapters, a (V, D) tensor in the wider of their
      dtypes. The gradient reaches the adapters. `modules_to_save` and `torch.nn.utils.parametrize` work likewise.
    - FSDP2 (`fully_shard`): a sharded weight is gathered, in the dtype of its shards, so every rank calls this and runs
      the backward. The gradients of the ranks are reduced to the shards as FSDP2 reduces others: to their mean, unless
      `set_gradient_divide_factor` says otherwise. A weight that is gathered already is returned as it is, and FSDP2
      reduces its gradient.

    Args:
        module: a whole model that has `get_output_embeddings`, or its head.

    Returns:
        `OutputHead`. Unpack it: `weight, bias, softcap, logit_scale = output_head(model)`.

    Expected gradient:
        That of the module's own forward, for every parameter that makes `weight` and `bias`. The norm in DoRA is a
        constant, as in PEFT.

    Raises:
        TypeError: `module` is no `torch.nn.Module`, or its weight is quantized.
        ValueError: no weight and bias express the module (LoRA dropout in training mode, other adapters, hooks or a
            `forward` that change the output), its parameters are flattened (FSDP1) or split by tensor parallelism, or
            its logits are not scaled and capped. Each error says what to do.

    Example:
        >>> import torch, kdloss
        >>> head = torch.nn.Linear(2, 3)
        >>> weight, bias, softcap, logit_scale = kdloss.output_head(head)
        >>> weight is head.weight, bias is head.bias, softcap, logit_scale
        (True, True, None, 1.0)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    root = module = _unwrapped(module)
    transform = LogitTransform(None, 1.0)
    if callable(getattr(module, "get_output_embeddings", None)):
        head: Any = module.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Module):
            raise ValueError(
                f"module must have a head, got {type(module).__name__}, whose get_output_embeddings returns "
                f"{type(head).__name__}: pass the module that makes its logits"
            )
        module = head
    weight, bias = _weight_and_bias(module)
    if module is not root:
        try:
            if _has_hooks(root):
                raise ValueError("its forward hooks may change them")
            transform = logit_transform(root, module, weight.shape[0])
        except ValueError as error:
            raise ValueError(
                f"module must scale and cap the logits of its head, got {type(root).__name__}: {error}; pass its head, "
                "output_head(model.get_output_embeddings()), and set the softcap and logit_scale for which "
                f"linear_token_logprobs equals token_logprobs of the model's own logits, or {_FROM_LOGITS}"
            ) from error
    weight, bias = _whole(root, module, weight, bias)
    return OutputHead(weight, bias, *transform)


# Wrappers that change neither the parameters nor the values of the module inside: where each class is, once its package
# is imported, and how to get the module. Importing the packages would take seconds.
_WRAPPERS: tuple[tuple[str, str, Callable[[Any], nn.Module]], ...] = (
    ("torch._dynamo", "OptimizedModule", lambda wrapper: wrapper._orig_mod),
    ("torch.nn.parallel", "DistributedDataParallel", lambda wrapper: wrapper.module),
    ("peft", "PeftModel", lambda wrapper: wrapper.get_base_model()),
)


def _is(module: nn.Module, package: str, name: str) -> bool:
    """Whether the module is of a class of a package that may be missing or not imported."""
    found = getattr(sys.modules.get(package), name, None)
    return found is not None and isinstance(module, found)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DDP and PEFT, which change none of its parameters."""
    while inner := [get for package, name, get in _WRAPPERS if _is(module, package, name)]:
        module = inner[0](module)
    if _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        raise ValueError(
            "module must have parameters of its own, got FullyShardedDataParallel, which flattens them: call the loss "
            "inside the forward of the wrapped module, or shard the model with fully_shard (FSDP2)"
        )
    return module


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that `module` multiplies with, as DTensors where it holds DTensors."""
    module = _unwrapped(module)
    if _is(module, "peft.utils.other", "ModulesToSaveWrapper"):
        return _weight_and_bias(_in_use(module))
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is not None and type(module).forward is lora.Linear.forward:
        weight, bias = _with_adapters(module)
        known = True
    else:
        weight, bias = _own(module)
        known = type(module).forward is nn.Linear.forward
    # a tied head multiplies with the embedding's weight, and never runs its forward
    if not isinstance(module, nn.Embedding) and not (known and _runs_as_its_class_does(module)):
        _compare(module, weight, bias)
    return weight, bias


def _own(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The attributes `weight` and `bias`, checked."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    name = type(module).__name__
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"module must have a weight (V, D), or get_output_embeddings(), got {name}: pass the module that makes the "
            f"logits, such as output_head(model.lm_head), or {_FROM_LOGITS}"
        )
    wrapped = not _checks.is_dtensor(weight) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight)
    if wrapped or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise TypeError(
            f"module must have a floating-point weight, got {name} with {type(weight).__name__} in {weight.dtype}: "
            f"load the head without quantization, or {_FROM_LOGITS}"
        )
    # FSDP1 leaves a view of storage that it has freed, or flat; ZeRO-3 an empty tensor
    freed = weight.numel() == 0 or not (_checks.is_dtensor(weight) or weight.untyped_storage().size())
    if freed or weight.ndim < 2:
        raise ValueError(
            f"module must hold a weight (V, D), got {name} with {tuple(weight.shape)}, split or freed: under FSDP1 or "
            f"ZeRO-3, call the loss inside the forward of the wrapped module, or {_FROM_LOGITS}"
        )
    if weight.ndim > 2:
        raise ValueError(
            f"{_MUST}, with a weight (V, D), got {name} with {tuple(weight.shape)}: pass the module that does, or "
            f"{_FROM_LOGITS}"
        )
    return weight, bias if isinstance(bias, Tensor) else None


def _in_use(wrapper: Any) -> nn.Module:
    """The module that PEFT's `modules_to_save` runs in place of the original one, or the original one."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module  # type: ignore[no-any-return]
    return wrapper.modules_to_save[active[0]]  # type: ignore[no-any-return]


def _with_adapters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a LoRA layer of PEFT with its active adapters, in the order of its forward."""
    weight, bias = _weight_and_bias(layer.base_layer)
    if layer.disable_adapters and layer.merged:
        raise ValueError(
            "module must not have disabled adapters that are merged, got LoRA, whose forward would unmerge them: call "
            "unmerge_adapter() of the PEFT model"
        )
    if layer.disable_adapters or layer.merged:  # merged adapters are in the weight of the base
        return weight, bias
    base_weight, base_bias = weight, bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        variant = layer.lora_variant.get(name)
        if variant is not None and type(variant).__name__ != "DoraLinearVariant":
            raise ValueError(
                f"{_MUST}, with LoRA or DoRA, got {type(variant).__name__} in its adapter {name!r}: {_FROM_LOGITS}"
            )
        dropout = layer.lora_dropout[name]
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            raise ValueError(
                f"{_MUST}, got lora_dropout={dropout.p} of its adapter {name!r} in training mode: call eval() on "
                f"the head, which keeps its gradient, or set lora_dropout=0, or {_FROM_LOGITS}"
            )
        delta = layer.get_delta_weight(name)
        weight = weight + delta
        if layer.lora_bias[name]:
            shift = layer.lora_B[name].bias * layer.scaling[name]
            bias = shift if bias is None else bias + shift
        if variant is not None:  # V + dV, times a magnitude per row over its norm, which PEFT detaches
            dora = layer.lora_magnitude_vector[name]
            norm = dora.get_weight_norm(base_weight, delta.detach(), scaling=1).detach()
            factor = dora.weight / norm
            weight = factor[:, None] * weight
            if bias is not None and bias is not base_bias:  # DoRA does not scale the bias of the base
                rest = bias if base_bias is None else bias - base_bias
                bias = factor * rest if base_bias is None else base_bias + factor * rest
    return weight, bias


def _runs_as_its_class_does(module: nn.Module) -> bool:
    """Whether nothing may change the output of its forward: a hook, or a patch."""
    return "forward" not in vars(module) and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks run beside its forward, except those of FSDP2 and DTensor, which change no value."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all((getattr(hook, "__module__", None) or "").startswith("torch.distributed.") for hook in hooks)


def _compare(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a module that is not `hidden @ weight.T + bias` on rows of three sizes, or that has other parameters."""
    must, way_out = f"{_MUST}, got {type(module).__name__}", f"pass the module that does, or {_FROM_LOGITS}"
    makers = _leaves(weight, bias)
    # what a weight without a graph is made of is known by name alone
    of_weight = ("parametrizations.weight.", "parametrizations.bias.", "base_layer.")
    others = [key for key, x in module.named_parameters() if id(x) not in makers and not key.startswith(of_weight)]
    if others:
        raise ValueError(f"{must}, whose parameters {', '.join(others)} are in neither: {way_out}")
    if _checks.is_dtensor(weight) or weight.device.type == "meta":
        raise ValueError(
            f"{must}, which cannot be compared with that while its weight is sharded or on the device meta: {way_out}"
        )
    rows = torch.sin(torch.arange(1, 3 * weight.shape[1] + 1, dtype=torch.float32, device=weight.device))
    # small rows show what is added to the logits, large ones what bounds them
    rows = rows.reshape(3, -1) * torch.tensor([[2.0**-10], [1.0], [2.0**10]], device=weight.device)
    rows = rows.to(weight.dtype)
    with torch.no_grad():
        expected = F.linear(rows, weight, None if bias is None else bias.to(weight.dtype))
    try:
        found = module(rows).detach()  # with a graph, because hooks such as weight_norm's set the weight as they run
        off = (found - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(min=torch.finfo(expected.dtype).tiny)
    except Exception as error:
        raise ValueError(
            f"{must}, which does not run on hidden states (3, D), {type(error).__name__}: {error}: {way_out}"
        ) from error
    if not expected.isfinite().all():
        raise ValueError(f"{must}, whose weight or bias is not finite: {way_out}")
    if not off.max() <= max(1e-5, 2 * torch.finfo(weight.dtype).eps):
        raise ValueError(
            f"{must}, whose output differs from that by {float(off.max()):.2g} of the largest logit: {way_out}"
        )


def _leaves(*tensors: Tensor | None) -> set[int]:
    """The ids of the parameters that get a gradient through the tensors."""
    found, todo = {id(x) for x in tensors}, [x.grad_fn for x in tensors if x is not None]
    seen = set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        todo += [following for following, _ in node.next_functions]
    return found


def _whole(root: nn.Module, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias as plain tensors, gathered where FSDP2 has them sharded."""
    if not _checks.is_dtensor(weight):
        return weight, bias
    divisors = {gradient_divisor(root, x) for x in module.parameters() if _checks.is_dtensor(x)}
    if len(divisors) != 1 or None in divisors:
        placements = weight.placements  # type: ignore[attr-defined]
        raise ValueError(
            f"module must hold the shards of fully_shard, got {type(module).__name__}, whose weight is placed "
            f"{placements}. Under FSDP2, pass the whole model, or call fully_shard on the head too, or call the loss "
            "inside the model's forward. Under tensor parallelism, pass head.weight to the loss, with "
            "shard=VocabShard.from_dtensor(head.weight)"
        )
    (divisor,) = divisors
    return gathered(weight, divisor), None if bias is None else gathered(bias, divisor)
