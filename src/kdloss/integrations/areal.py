"""AReaL: `grpo_loss_fn` with AReaL's signature, batch keys and statistics.

    from kdloss.integrations import areal as kd_areal
    kd_areal.install()  # in every process that trains: docs/integrations/areal.md

Tensors are packed (T,) with `cu_seqlens`, or padded (B, L). AReaL has already rolled them to prediction positions, with
two exceptions: `versions`, which are shifted here, and the scores of a teacher behind a rollout engine, which
`teacher_alignment="token"` shifts.

The loss is the mean over the trained tokens of the micro-batch; the engine rescales it by their number. Masks that drop
tokens (M2PO, rejection sampling) set their loss to 0 and do not change that number, so micro-batches still sum to
the batch.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss import Surrogate, _checks
from kdloss._checks import CHOOSE_WEIGHT
from kdloss._docs import documented

from ._areal_masks import Rejection, m2po_mask, reject
from ._layout import row_cu_seqlens, sequence_means
from ._lazy import Hook, require
from ._texts import KDRL_ARGS

_log = logging.getLogger("kdloss")


def install(**options: Any) -> None:
    """Replace AReaL's `grpo_loss_fn` by the one of this module, in this process.

    AReaL's actor looks up its loss when it trains, so call this at any time before. In AReaL's default mode, the single
    controller, the actor is in a worker process: call this there, in an engine class of your own
    (docs/integrations/areal.md). A call in the controller changes nothing, and logs a warning.

    Args:
        options: keyword-only arguments of `grpo_loss_fn`, such as `direct_penalty=True`.

    Raises:
        TypeError: an option is not a keyword-only argument of `grpo_loss_fn`.
        ImportError: AReaL is missing, or lacks what the adapter needs.
    """
    known = [p.name for p in inspect.signature(grpo_loss_fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise TypeError(f"options must be among {', '.join(known)}, got {name!r}; AReaL passes the rest itself")
    if _in_the_controller():
        _log.warning(
            "AReaL's single controller trains in worker processes, and this process is none of them: AReaL's own loss "
            "stays in use there. Call install in the __init__ of an engine class of your own, as "
            "docs/integrations/areal.md shows, or start with a launcher of AReaL, which sets AREAL_SPMD_MODE=1"
        )
    _areal().grpo_loss_fn = functools.partial(grpo_loss_fn, **options)


@documented(KDRL_ARGS)
def grpo_loss_fn(
    logprobs: Tensor,  # (T,) or (B, L)
    entropy: Tensor,  # as logprobs
    input_data: Mapping[str, Any],
    eps_clip: float,
    eps_clip_higher: float | None,
    c_clip: float | None,
    rejection_sampling: Any | None = None,
    m2_threshold: float | None = None,
    importance_sampling_level: str = "token",
    current_version: int | None = None,
    prox_logp_method: str = "recompute",
    use_sapo_loss: bool = False,
    sapo_tau_pos: float = 1.0,
    sapo_tau_neg: float = 1.05,
    use_decoupled_loss: bool = False,
    vocab_min_logits: Tensor | None = None,
    vocab_max_logits: Tensor | None = None,
    *,
    use_cispo_loss: bool = False,
    direct_penalty: bool = False,
    teacher_alignment: str = "prediction",
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
) -> Tensor:  # ()
    """AReaL's actor loss: rl_loss_weight * RL + distill_loss_weight * reverse KL, as a local token mean.

    The RL ratio is against `prox_logp`. The distillation ratio is against the batch's `logprobs`, the policy that
    sampled. The weights are read from the batch, where AReaL stores them next to `teacher_logp`, which needs a
    `distill_loss_weight`. Without `teacher_logp` the loss is the RL term alone.

    Args:
        logprobs: log-probs of the tokens under the student, nats. Differentiable.
        entropy: per token, for the statistics only.
        input_data: `logprobs`, `advantages`, `loss_mask` and, where they apply, `prox_logp`, `teacher_logp`,
            `rl_loss_weight`, `distill_loss_weight`, `cu_seqlens`, `versions`.
        eps_clip: the ratio is clipped below at 1 - eps_clip.
        eps_clip_higher: the ratio is clipped above at 1 + eps_clip_higher. None: 1 + eps_clip.
        c_clip: dual clip: upper bound of the ratio for negative advantages, > 1. None: no bound.
        rejection_sampling: AReaL's `RejectionSamplingConfig`, which drops or reweights stale samples. None: off.
        m2_threshold: M2PO drops the largest squared log-ratios until the mean of the rest is below it. None: off.
        importance_sampling_level: "token", or "sequence" (GSPO: ratio and advantage of whole sequences).
        current_version: version of the student, for the statistics and for "loglinear".
        prox_logp_method: how AReaL obtains `prox_logp`. "loglinear" derives it here if the batch has none.
        use_sapo_loss: True: SAPO instead of PPO's clip; its ratio is against the policy that sampled.
        sapo_tau_pos, sapo_tau_neg: SAPO's temperatures for positive and negative advantages.
        use_decoupled_loss: AReaL's decoupled PPO; read only to refuse it with SAPO.
        vocab_min_logits, vocab_max_logits: for the statistics only.
        use_cispo_loss: True: CISPO instead of PPO's clip, with the bounds 1 - eps_clip and 1 + eps_clip_higher.
        direct_penalty: True: AReaL's own joint mode, which descends logp - teacher_logp where rl_loss_weight is not 0.
            The teacher is then in the value only and not in the gradient. For parity with AReaL; warns.
        teacher_alignment: "prediction", or "token" if `teacher_logp` comes from `teacher.engine_type="rollout"`, whose
            scores AReaL leaves at the token's own position.
        {kd_discount}
        {kd_reward_clip}
        {kd_max_ratio}

    Returns:
        (), differentiable in `logprobs`.

    Expected gradient:
        That of `kdloss.kdrl_loss`, with the surrogate that the options select.

    Raises:
        ValueError: options exclude each other; the layout does not support a level or an alignment; the batch has
            `teacher_logp` without `distill_loss_weight`; `teacher_logp` is visibly at the other alignment; under
            "token" the trained tokens are not the end of each sequence; or `prox_logp` is missing and cannot be
            derived.
        ImportError: AReaL is missing, or lacks what the adapter needs.
    """
    _check_modes(
        importance_sampling_level, use_sapo_loss, use_decoupled_loss, use_cispo_loss, c_clip, rejection_sampling
    )
    batch = _Batch(logprobs, input_data)
    prox_logp = batch.old_logp if use_sapo_loss else batch.prox_logp(prox_logp_method, current_version)
    trained, count = batch.loss_mask, batch.loss_mask.sum()
    if m2_threshold is not None:
        trained = m2po_mask(prox_logp, batch.old_logp, trained, m2_threshold)
    kept, weights, rejection = trained, None, None
    if rejection_sampling is not None:
        rejection = reject(prox_logp, batch.old_logp, trained, rejection_sampling, lambda: batch.cu_seqlens)
        kept, weights = rejection.kept, rejection.weights

    policy, reference, advantages = batch.logp, prox_logp, batch.advantages
    if importance_sampling_level == "sequence":
        policy, reference, advantages = batch.per_sequence(prox_logp, kept)
    clip_high = eps_clip if eps_clip_higher is None else eps_clip_higher
    surrogate_of: Callable[..., Surrogate]
    if use_sapo_loss:
        surrogate_of = functools.partial(kdloss.sapo_surrogate, tau_positive=sapo_tau_pos, tau_negative=sapo_tau_neg)
    elif use_cispo_loss:
        surrogate_of = functools.partial(kdloss.cispo_surrogate, clip_low=eps_clip, clip_high=clip_high)
    else:
        surrogate_of = functools.partial(
            kdloss.clipped_surrogate, clip_low=eps_clip, clip_high=clip_high, dual_clip=c_clip
        )
    surrogate = surrogate_of(policy, reference, advantages, loss_mask=kept, weights=weights)
    loss = kdloss.token_mean(surrogate.loss, loss_mask=kept, normalizer=count)

    record = _Record(batch, trained)
    if input_data.get("teacher_logp") is not None:
        teacher_logp = batch.teacher_logp(teacher_alignment)
        if input_data.get("distill_loss_weight") is None:
            raise ValueError(f"input_data must hold distill_loss_weight beside teacher_logp, got none: {CHOOSE_WEIGHT}")
        rl_loss_weight = input_data.get("rl_loss_weight", 1.0)
        distilled = kdloss.kdrl_loss(
            batch.logp,
            batch.old_logp,
            teacher_logp,
            None,
            loss_mask=trained,
            normalizer=count,
            rl_loss_weight=0.0,  # the RL term is the surrogate above
            distill_loss_weight=input_data["distill_loss_weight"],
            kd_discount=kd_discount,
            kd_reward_clip=kd_reward_clip,
            kd_max_ratio=kd_max_ratio,
            cu_seqlens=batch.cu_seqlens if kd_discount else None,
            direct_penalty=direct_penalty and rl_loss_weight != 0,
        ).loss
        loss = distilled if rl_loss_weight == 0 else rl_loss_weight * loss + distilled
        record.teacher(teacher_logp, importance_sampled=rl_loss_weight == 0)
    record.actor(surrogate, prox_logp, entropy, kept)
    observed = trained if rejection is None else record.rejection(rejection, prox_logp)
    record.vocabulary(vocab_min_logits, vocab_max_logits)
    if use_sapo_loss:
        one = torch.ones_like(batch.logp)
        positive, negative = (surrogate_of(policy.detach(), reference, x, loss_mask=kept).loss for x in (one, -one))
        record.gates(-positive, negative, advantages)
    else:
        record.clips(surrogate)
    record.staleness(observed, prox_logp_method, current_version)
    return loss


class _Batch:
    """AReaL's micro-batch as flat streams at prediction positions."""

    def __init__(self, logprobs: Tensor, input_data: Mapping[str, Any]) -> None:
        self.data, self.shape = input_data, logprobs.shape
        self.logp = logprobs.flatten()
        self.old_logp = input_data["logprobs"].detach().flatten()
        self.advantages = input_data["advantages"].flatten()
        self.loss_mask = input_data["loss_mask"].bool().flatten()

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        if len(self.shape) == 2:
            return row_cu_seqlens(self.logp.view(self.shape))
        if self.data.get("cu_seqlens") is None:
            raise ValueError("input_data must hold cu_seqlens beside packed (T,) tensors, got none")
        if not self.whole:
            raise ValueError(
                f"cu_seqlens must end at the number of tokens {self.shape[0]}, got {int(self.data['cu_seqlens'][-1])}: "
                'a context-parallel slice holds no whole sequence; there, use importance_sampling_level="token", '
                'level="token" of rejection_sampling, teacher_alignment="prediction" and kd_discount=0'
            )
        given: Tensor = self.data["cu_seqlens"]
        return given

    @functools.cached_property
    def whole(self) -> bool:
        """True if the tensors hold whole sequences, False for a context-parallel slice."""
        if len(self.shape) == 2:
            return True
        cu_seqlens = self.data.get("cu_seqlens")
        return cu_seqlens is not None and self._read["tokens"] == self.shape[0]

    @functools.cached_property
    def _read(self) -> dict[str, int]:
        """Everything that is read from the values of a micro-batch, in one wait for the device."""
        asked = {}
        if len(self.shape) == 1 and self.data.get("cu_seqlens") is not None:
            asked["tokens"] = self.data["cu_seqlens"][-1]
        if self.data.get("teacher_logp") is not None:
            # a rollout engine writes its scores at the tokens' own positions, one position late, and 0 elsewhere
            scored, own = self.data["teacher_logp"].flatten() != 0, self.loss_mask.roll(1)
            asked["trained"] = self.loss_mask.any()
            asked["only_late"] = (own & ~self.loss_mask & scored).any()
            asked["in_place"] = (self.loss_mask & ~own & scored).any()
            asked["outside"] = (scored & ~own & self._of_trained_sequences()).any()
        read = torch.stack([x.to(self.logp.device, torch.int64) for x in asked.values()]).tolist() if asked else []
        return dict(zip(asked, read, strict=True))

    def _of_trained_sequences(self) -> Tensor:
        """True at the tokens of sequences with a trained token; everywhere in a context-parallel slice."""
        if len(self.shape) == 2:
            rows: Tensor = self.loss_mask.view(self.shape).any(1).repeat_interleave(self.shape[1])
            return rows
        cu_seqlens: Tensor | None = self.data.get("cu_seqlens")
        if cu_seqlens is None:
            return torch.ones_like(self.loss_mask)
        total = self.loss_mask.shape[0]
        ids = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(total, device=cu_seqlens.device), right=True)
        trained = torch.zeros(cu_seqlens.shape[0], dtype=torch.int64, device=cu_seqlens.device)
        trained.scatter_reduce_(0, ids, self.loss_mask.to(ids), "amax")
        found: Tensor = (trained[ids] > 0) | (cu_seqlens[-1] != total)
        return found

    def versions(self) -> Tensor | None:
        """Policy versions, moved to the position of the token's log-prob; None for a slice and if there are none."""
        if self.data.get("versions") is None or not self.whole:
            return None
        own = self.data["versions"].flatten()
        return kdloss.to_prediction_positions(own, cu_seqlens=self.cu_seqlens, fill=-1)

    def prox_logp(self, method: str, current_version: int | None) -> Tensor:
        prox_logp: Tensor | None = self.data.get("prox_logp")
        if prox_logp is not None:
            return prox_logp.detach().flatten()
        versions = self.versions()
        if method != "loglinear" or current_version is None or versions is None:
            raise ValueError(
                f"input_data holds no prox_logp, and prox_logp_method={method!r} cannot replace it: let AReaL "
                'recompute it, or use prox_logp_method="loglinear" with versions of whole sequences and current_version'
            )
        approximations: dict[str, Tensor] = _areal().compute_prox_logp_approximations(
            old_logp=self.old_logp,
            logprobs=self.logp.detach(),
            versions=versions,
            current_version=current_version,
            method="loglinear",
        )
        return approximations["loglinear"]

    def teacher_logp(self, alignment: str) -> Tensor:
        teacher_logp: Tensor = self.data["teacher_logp"].detach().flatten()
        if alignment == "token":
            self._check_runs()
            if not self._read["in_place"] and not self._read["only_late"] and self._read["trained"]:
                _checks.warn(
                    "cannot tell whether teacher_logp is late: in this micro-batch it is 0 before the first and at the "
                    "last trained token of every sequence. It is shifted, as teacher_alignment='token' says"
                )
            if self._read["in_place"]:
                raise ValueError(
                    "teacher_logp has scores at positions where a rollout teacher leaves 0: they are at prediction "
                    "positions already, as from a train engine or a version of AReaL that shifts them; "
                    "use teacher_alignment='prediction'"
                )
            return kdloss.to_prediction_positions(teacher_logp, cu_seqlens=self.cu_seqlens, fill=0)
        if alignment != "prediction":
            raise ValueError(f"teacher_alignment must be 'prediction' or 'token', got {alignment!r}")
        if self._read["only_late"] and not self._read["outside"]:
            raise ValueError(
                "teacher_logp has scores at the tokens' own positions and nowhere else: AReaL's rollout teacher "
                "(teacher.engine_type='rollout') leaves it one position late; use teacher_alignment='token'"
            )
        return teacher_logp

    def _check_runs(self) -> None:
        """Check that the trained tokens end each sequence.

        AReaL takes the last n scores of its rollout teacher for a sequence with n trained tokens.
        """
        cu_seqlens, total = self.cu_seqlens, self.logp.shape[0]
        position = torch.arange(total, device=self.logp.device)
        valid = self.data.get("attention_mask")
        valid = self.loss_mask.roll(1) if valid is None else valid.bool().flatten()
        if len(self.shape) == 1:  # packed: no padding
            valid = torch.ones_like(self.loss_mask)
        one = functools.partial(kdloss.segment_sum, loss_mask=torch.ones_like(valid), cu_seqlens=cu_seqlens)
        count = one(self.loss_mask.double())
        ids = kdloss.segment_ids(cu_seqlens, total_tokens=total)
        last = (
            torch.zeros_like(cu_seqlens[1:])
            .to(position)
            .scatter_reduce(0, ids, torch.where(valid, position, 0), "amax")
        )
        spread = functools.partial(kdloss.broadcast_to_tokens, cu_seqlens=cu_seqlens, total_tokens=total)
        end = spread(last)  # the last position predicts nothing
        run = (position < end) & (position >= end - spread(count).long())
        if bool((run != self.loss_mask).any()):
            raise ValueError(
                "teacher_alignment='token' needs the trained tokens of each sequence to be one run up to its end: "
                "AReaL's rollout teacher gives the last n scores to the n trained tokens, whatever lies between, so "
                "those of several turns are wrong; use a teacher that is not behind a rollout engine"
            )

    def per_sequence(self, prox_logp: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """GSPO: each token gets the mean log-ratio of its sequence, to be compared with 0, and the mean advantage."""
        mean = functools.partial(sequence_means, loss_mask=kept, cu_seqlens=self.cu_seqlens)
        log_ratio = mean(kdloss.kl_k1(self.logp, prox_logp, loss_mask=kept))
        return log_ratio, torch.zeros_like(log_ratio), mean(self.advantages)


def _check_modes(
    level: str, sapo: bool, decoupled: bool, cispo: bool, c_clip: float | None, rejection_sampling: Any | None
) -> None:
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {level!r}")
    if sapo and cispo:
        raise ValueError("use_sapo_loss and use_cispo_loss exclude each other; set one")
    if sapo and (decoupled or rejection_sampling is not None):
        raise ValueError(
            "SAPO's ratio is against the policy that sampled: unset use_decoupled_loss and rejection_sampling, "
            "or use use_cispo_loss=True, which takes both"
        )
    if cispo and level == "sequence":
        raise ValueError(
            "CISPO's ratio is per token: use importance_sampling_level='token', or GSPO without use_cispo_loss"
        )
    if cispo and c_clip is not None:
        raise ValueError("CISPO bounds every ratio by itself: set c_clip to None, or unset use_cispo_loss")


class _Record:
    """Records the statistics of AReaL's own function, under its names and denominators."""

    def __init__(self, batch: _Batch, trained: Tensor) -> None:
        self.areal, self.batch, self.trained, self.logp = _areal(), batch, trained, batch.logp.detach()
        n_tokens = self.areal.infer_token_denominator(batch.data, trained.view(batch.shape))
        self.areal.stats_tracker.denominator(n_tokens=n_tokens)
        self._denominator(n_valid_tokens=trained)

    def teacher(self, teacher_logp: Tensor, *, importance_sampled: bool) -> None:
        """log q - log p; times the ratio in pure distillation, as in AReaL."""
        reverse_kl = kdloss.kl_k1(self.logp, teacher_logp, loss_mask=self.trained)
        if importance_sampled:
            reverse_kl = kdloss.importance_sampled_surrogate(
                self.logp, self.batch.old_logp, -reverse_kl, loss_mask=self.trained
            ).loss
        self._stat("n_valid_tokens", rkl_loss=reverse_kl)

    def actor(self, surrogate: Surrogate, prox_logp: Tensor, entropy: Tensor, kept: Tensor) -> None:
        self._denominator(clipped_tokens=surrogate.clipped, dual_clipped_tokens=surrogate.dual_clipped)
        self._stat(
            "n_valid_tokens",
            importance_weight=torch.where(kept, surrogate.ratio, 0),
            approx_kl=self.logp - prox_logp,
            new_logp=self.logp,
            old_logp=self.batch.old_logp,
            entropy=entropy,
            actor_loss=surrogate.loss,
            clip_ratio=surrogate.clipped,
            dual_clip_ratio=surrogate.dual_clipped,
        )

    def rejection(self, rejection: Rejection, prox_logp: Tensor) -> Tensor:
        """Record the rejection; returns the mask of the tokens that still count."""
        observed = rejection.kept & (rejection.weights > 0)
        self._denominator(unclipped_behave_tokens=observed)
        self._stat(
            "unclipped_behave_tokens",
            behave_imp_weight=rejection.weights,
            behave_approx_kl=kdloss.kl_k1(prox_logp, self.batch.old_logp, loss_mask=observed),
        )
        self.areal.stats_tracker.scalar(rs_filtered_fraction=float(rejection.fraction))
        return observed

    def vocabulary(self, smallest: Tensor | None, largest: Tensor | None) -> None:
        if smallest is not None and largest is not None:
            self.areal.stats_tracker.stat(vocab_min_logits=smallest, vocab_max_logits=largest, denominator="n_tokens")

    def clips(self, surrogate: Surrogate) -> None:
        self._stat(
            "clipped_tokens",
            clipped_new_logp=torch.where(surrogate.clipped, self.logp, 0),
            clipped_old_logp=torch.where(surrogate.clipped, self.batch.old_logp, 0),
        )

    def gates(self, positive: Tensor, negative: Tensor, advantages: Tensor) -> None:
        soft = torch.where(advantages > 0, positive, negative)
        self._stat("n_valid_tokens", sapo_soft_gate=soft, sapo_scaled_gate_pos=positive, sapo_scaled_gate_neg=negative)

    def staleness(self, observed: Tensor, prox_logp_method: str, current_version: int | None) -> None:
        """AReaL's own statistics of the proximal policy and of versions, with the versions at prediction positions."""
        shape, versions = self.batch.shape, self.batch.versions()
        versions = None if versions is None else versions.view(shape)
        self.areal._log_proximal_approximation_stats(
            prox_logp_method=prox_logp_method,
            prox_logp_gt=self.batch.data.get("prox_logp"),
            old_logp=self.batch.old_logp.view(shape),
            logprobs=self.logp.view(shape),
            versions=versions,
            current_version=current_version,
            compute_logp_mask=observed.view(shape),
        )
        if versions is not None and current_version is not None:
            self.areal._log_version_staleness_stats(
                versions=versions, current_version=current_version, version_metrics_mask=observed.view(shape)
            )

    def _denominator(self, **masks: Tensor) -> None:
        shape = self.batch.shape
        self.areal.stats_tracker.denominator(**{name: mask.view(shape) for name, mask in masks.items()})

    def _stat(self, denominator: str, **values: Tensor) -> None:
        shape = self.batch.shape
        values = {name: x.detach().float().view(shape) for name, x in values.items()}
        self.areal.stats_tracker.stat(**values, denominator=denominator)


_HOOKS = {
    "areal.trainer.ppo.actor": {
        "grpo_loss_fn": Hook(
            replaced_by=grpo_loss_fn,
            keys=(
                "logprobs",
                "advantages",
                "loss_mask",
                "prox_logp",
                "teacher_logp",
                "distill_loss_weight",
                "versions",
            ),
        ),
        "stats_tracker": Hook(),
        "infer_token_denominator": Hook(),
        "compute_prox_logp_approximations": Hook(
            takes=("old_logp", "logprobs", "versions", "current_version", "method")
        ),
        "_log_proximal_approximation_stats": Hook(takes=("prox_logp_method", "prox_logp_gt", "compute_logp_mask")),
        "_log_version_staleness_stats": Hook(takes=("versions", "current_version", "version_metrics_mask")),
    }
}


def _in_the_controller() -> bool:
    """Whether AReaL trains elsewhere: it gives every process that trains a RANK before it makes the engine."""
    return "RANK" not in os.environ and os.environ.get("AREAL_SPMD_MODE", "false").lower() not in ("true", "1")


@functools.cache
def _areal() -> Any:
    return require("areal", at_least="1.0.4", below="1.1", module="areal.trainer.ppo.actor", hooks=_HOOKS)
