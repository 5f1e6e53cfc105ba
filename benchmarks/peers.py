"""Other people's functions, in the form of each path; what is not installed, or cannot run here, says why.

    logits:  f(logits, labels) -> (logp,) or (logp, entropy)
    hidden:  f(hidden, weight, labels, loss_mask) -> (logp,) or (logp, entropy), 0 where untrained
    ce:      f(hidden, weight, labels, loss_mask) -> (mean of -logp over the trained tokens,)

`labels` holds -100 exactly where `loss_mask` is False. Packages are imported here and nowhere else, when asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contenders import Contender, Function
from .processes import without_paths

ROWS_A_SEQUENCE = 256  # trainers call TRL's function on (B, L, V); a flat stream is cut into sequences of this length


class AbsentError(Exception):
    """A peer that cannot take part, with the reason."""


def load(module: str, name: str) -> Any:
    """`name` of `module`, or `AbsentError`."""
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise AbsentError(f"{module} has no {name} in this version") from None
    except ModuleNotFoundError as error:
        raise AbsentError(f"{error.name} is not installed") from None
    except Exception as error:  # an import that fails for any reason of the package's own
        reason = without_paths(f"{type(error).__name__}: {error}".split("\n", 1)[0])[:300]
        raise AbsentError(f"{module} does not import: {reason}") from None


def need_gpu(device: str) -> None:
    if device != "cuda":
        raise AbsentError("needs a GPU")


# --- plain torch ---------------------------------------------------------------------------------------------------


def naive_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return (torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).squeeze(-1),)


def naive_logits_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    all_logp = torch.log_softmax(logits.float(), -1)
    return all_logp.gather(-1, labels[:, None]).squeeze(-1), -(all_logp.exp() * all_logp).sum(-1)


def split_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The naive formula on 128 rows at a time."""
    pairs = zip(logits.split(128), labels.split(128), strict=True)
    return (torch.cat([naive_logits(rows, some)[0] for rows, some in pairs]),)


def naive_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    (logp,) = naive_logits(F.linear(hidden, weight), labels.clamp(min=0))
    return (torch.where(loss_mask, logp, 0),)


def naive_hidden_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    both = naive_logits_entropy(F.linear(hidden, weight), labels.clamp(min=0))
    return tuple(torch.where(loss_mask, x, 0) for x in both)


def compact_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    """The naive formula on the trained rows, picked by the mask: what a careful user writes."""
    (logp,) = naive_logits(F.linear(hidden[loss_mask], weight), labels[loss_mask])
    return (logp.new_zeros(labels.shape).masked_scatter(loss_mask, logp),)


def naive_ce(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    return (F.cross_entropy(F.linear(hidden, weight).float(), labels),)


def torch_linear_ce_per_token() -> Function:
    linear_cross_entropy = load("torch.nn.functional", "linear_cross_entropy")

    def torch_linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        return (-linear_cross_entropy(hidden, weight, labels, reduction="none"),)

    return torch_linear_ce


def torch_linear_ce_mean() -> Function:
    linear_cross_entropy = load("torch.nn.functional", "linear_cross_entropy")
    options = load("torch.nn", "LinearCrossEntropyOptions")()  # its chunked form

    def torch_linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        return (linear_cross_entropy(hidden, weight, labels, options=options),)

    return torch_linear_ce


# --- TRL -----------------------------------------------------------------------------------------------------------


def _sequences(x: Tensor) -> Tensor:
    length = ROWS_A_SEQUENCE if x.shape[0] % ROWS_A_SEQUENCE == 0 else x.shape[0]
    return x.view(-1, length, *x.shape[1:])


def trl_logits() -> Function:
    selective_log_softmax = load("trl.trainer.utils", "selective_log_softmax")

    def trl(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (selective_log_softmax(_sequences(logits), _sequences(labels)).flatten(),)

    return trl


def trl_logits_entropy() -> Function:
    both = load("trl.trainer.utils", "selective_log_softmax_and_entropy")

    def trl(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logp, entropy = both(_sequences(logits), _sequences(labels))
        return logp.flatten(), entropy.flatten()

    return trl


def trl_hidden(*, entropy: bool) -> Function:
    chunked = load("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    slice_width = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    extra = ("entropy",) if entropy else ()

    def trl(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        logp, entropy, *_ = chunked.apply(
            hidden[loss_mask], weight, None, labels[loss_mask], 1.0, slice_width, None, 1.0, extra
        )
        used = (logp,) if entropy is None else (logp, entropy)
        return tuple(x.new_zeros(labels.shape).masked_scatter(loss_mask, x) for x in used)

    return trl


# --- Liger-Kernel, cut-cross-entropy -------------------------------------------------------------------------------


def liger_logits(device: str) -> Function:
    need_gpu(device)
    cross_entropy = load("liger_kernel.transformers.functional", "liger_cross_entropy")

    def liger(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (-cross_entropy(logits, labels, reduction="none"),)

    return liger


def liger_hidden(*, entropy: bool) -> Function:
    scaled = load("liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction")

    def liger(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        out = scaled.apply(hidden, weight, labels, return_entropy=entropy)
        return (-out[0], out[1]) if entropy else (-out,)

    return liger


def liger_ce(device: str) -> Function:
    need_gpu(device)
    fused = load("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")

    def liger(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        return (fused(hidden, weight, labels),)

    return liger


def cce(device: str, *, per_token: bool) -> Function:
    need_gpu(device)
    cut = load("cut_cross_entropy", "linear_cross_entropy")

    def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        out = cut(hidden, weight, labels, reduction="none" if per_token else "mean")
        return (-out if per_token else out,)

    return cut_cross_entropy


# --- what takes part in a path -------------------------------------------------------------------------------------


def collect(makers: dict[str, Callable[[], Function]], absent: dict[str, str], **common: Any) -> list[Contender]:
    """Contenders from {name: function that makes one}; those that cannot take part leave their reason in `absent`."""
    found = [_try(name, make, absent, common) for name, make in makers.items()]
    return [contender for contender in found if contender]


def _try(name: str, make: Callable[[], Function], absent: dict[str, str], common: dict[str, Any]) -> Contender | None:
    try:
        return Contender(name, make(), **common)
    except AbsentError as reason:
        absent[name] = str(reason)
        return None
