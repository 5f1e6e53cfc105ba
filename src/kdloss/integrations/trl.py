"""TRL: `KDRLTrainer`, a GRPOTrainer with a teacher, and divergences in place of those of DistillationTrainer and GKD.

    trainer = KDRLTrainer(model, reward_funcs, args, ..., teacher_model="Qwen/Qwen3-8B", distill_loss_weight=0.1)

TRL keeps all of its own: generation, rewards, every loss type, its metrics. The teacher scores the tokens once, when
they have been generated; the distillation term takes the student's log-probs from TRL's own forward, and TRL's own
denominator. Layout: (B, L) right-padded completions, entry l speaks of completion token l.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss import _checks

from ._lazy import require

_TRL = {"at_least": "1.16", "below": "1.17"}
_LOSS_TYPES = ("grpo", "sapo", "bnpo", "dr_grpo", "cispo", "dapo", "vespo", "luspo")


class KDRLMixin:
    """KDRL on top of a GRPOTrainer: rl_loss_weight * (TRL's loss) + distill_loss_weight * reverse KL to the teacher.

    `KDRLTrainer` is this on TRL's own; write `class Mine(KDRLMixin, MyGRPOTrainer)` for one of yours.

    Args:
        *args, **kwargs: those of GRPOTrainer.
        teacher_model: a model, or a path or hub id to load one from. It is scored at `args.temperature` like the
            student. None is for subclasses that override `teacher_logps`, and for a `distill_loss_weight` of 0.
        teacher_model_init_kwargs: for loading it, such as `{"dtype": "bfloat16"}`.
        distill_loss_weight: factor of the distillation term; an attribute, which a callback may change. 0 leaves TRL's
            loss and gradient as they are, and still logs the reverse KL.
        rl_loss_weight: factor of TRL's loss with all that TRL has put into it (the KL to the reference, the entropy
            bonus). 0 leaves it out.
        kd_discount, kd_reward_clip, kd_max_ratio, direct_penalty: as in `kdrl_loss`.

    Metrics: all of TRL's, and `distill/reverse_kl` (nats a token, over all ranks) and `distill/teacher_neg_inf` (the
    trained tokens that the teacher excludes).

    Expected gradient:
        rl_loss_weight * (that of TRL's loss) + distill_loss_weight * (that of `distillation_loss`), over the
        denominator of `args.loss_type`. The ratio of the second is against the policy that sampled: vLLM's log-probs
        where TRL has them, else `old_per_token_logps`. TRL's clip, its masks by entropy or off-policyness and its
        importance weights act on the RL term only.

    Raises:
        ImportError: TRL is missing or of another version.
        ValueError: an option is out of range, `args.loss_type` is unknown, or the teacher is the trained model, lacks
            some of its tokens, or is missing.
        NotImplementedError: images.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: Any = None,
        teacher_model_init_kwargs: dict[str, Any] | None = None,
        distill_loss_weight: float = 0.005,
        rl_loss_weight: float = 1.0,
        kd_discount: float = 0.0,
        kd_reward_clip: float | None = None,
        kd_max_ratio: float | None = None,
        direct_penalty: bool = False,
        **kwargs: Any,
    ) -> None:
        require("trl", **_TRL)
        self.teacher_model = None
        self.distill_loss_weight = distill_loss_weight
        self.rl_loss_weight = rl_loss_weight
        # KDRLConfig knows the ranges, and which options do not go together
        options = kdloss.KDRLConfig(
            rl_loss_weight=rl_loss_weight,
            distill_loss_weight=distill_loss_weight,
            kd_discount=kd_discount,
            kd_reward_clip=kd_reward_clip,
            kd_max_ratio=kd_max_ratio,
            direct_penalty=direct_penalty,
        )
        names = ("kd_discount", "kd_reward_clip", "kd_max_ratio", "direct_penalty")
        self._kd_options = {name: getattr(options, name) for name in names}
        self._scored: Tensor | None = None
        trainer: Any = super()
        trainer.__init__(*args, **kwargs)
        self._check_setup(teacher_model)
        if teacher_model is not None:
            self.teacher_model = self._prepared_teacher(teacher_model, teacher_model_init_kwargs or {})

    def teacher_logps(self, inputs: dict[str, Any]) -> Tensor | None:  # (B, L)
        """Log-probs of the completion tokens under the teacher, 0 or anything where `completion_mask` is 0.

        Override it for a teacher that is not a local model, such as a scoring server.

        Args:
            inputs: what TRL made of one generation: `prompt_ids`, `prompt_mask` (left-padded), `completion_ids`,
                `completion_mask` (right-padded).
        """
        this: Any = self
        if this.teacher_model is None:
            return None
        trainer: Any = super()
        args, training = this.args, this.model.training
        with torch.no_grad():
            logps: Tensor = trainer._get_per_token_logps_and_entropies(
                self.teacher_model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].shape[1],
                batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            )[0]
        return logps

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        trainer: Any = super()
        output: dict[str, Any] = trainer._generate_and_score_completions(inputs)
        if "num_images" in output or "pixel_values" in output:
            raise NotImplementedError("images: the teacher is scored on text only; train on text with KDRLTrainer")
        teacher_logps = self.teacher_logps(output)
        if teacher_logps is not None:
            output["teacher_per_token_logps"] = teacher_logps
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        scored = trainer._get_per_token_logps_and_entropies(*args, **kwargs)
        self._scored = scored[0]
        return scored

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        trainer: Any = super()
        self._scored = None
        loss: Tensor = trainer._compute_loss(model, inputs)
        logp = self._take_scored()
        teacher_logp = inputs.get("teacher_per_token_logps")
        if teacher_logp is None:
            if self.distill_loss_weight != 0:
                raise ValueError(f"teacher_model must be given where distill_loss_weight is {self.distill_loss_weight}")
            return self.rl_loss_weight * loss
        mask = _completion_mask(inputs)
        self._log_distillation(logp, teacher_logp, mask)
        if self.distill_loss_weight == 0:
            return self.rl_loss_weight * loss
        kd = self._distillation(logp, teacher_logp, mask, inputs)
        # a weight of 0 leaves the term out of the graph, so that nothing leaks from it
        return self.distill_loss_weight * kd + (0 if self.rl_loss_weight == 0 else self.rl_loss_weight * loss)

    def _take_scored(self) -> Tensor:
        """The log-probs of TRL's own forward, which are held no longer than this."""
        scored, self._scored = self._scored, None
        if scored is None:
            raise RuntimeError("TRL's loss did not call _get_per_token_logps_and_entropies: its hook has moved")
        return scored

    def _distillation(self, logp: Tensor, teacher_logp: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        rows, length = logp.shape
        old_logp = _behaviour_logp(logp, inputs)
        reduction, normalizer = self._denominator(mask, inputs)
        return kdloss.kdrl_loss(
            logp.flatten(),
            None if old_logp is None else old_logp.flatten(),
            teacher_logp.flatten(),
            None,
            loss_mask=mask.flatten(),
            rl_loss_weight=0.0,
            distill_loss_weight=1.0,
            reduction=reduction,
            normalizer=normalizer,
            cu_seqlens=torch.arange(0, rows * length + 1, length, device=logp.device),
            **self._kd_options,
        ).loss

    def _denominator(self, mask: Tensor, inputs: dict[str, Any]) -> tuple[str, float | Tensor]:
        """How TRL reduces `loss_type`, as (reduction, normalizer): micro-batches then add up as TRL's do."""
        this: Any = self
        training = this.model.training
        steps = this.current_gradient_accumulation_steps if training else 1
        rows, _ = mask.shape
        if this.loss_type in ("grpo", "sapo"):
            return "sequence_mean", rows * steps
        if this.loss_type == "bnpo":
            return "token_mean", mask.sum() * steps
        if this.loss_type == "dr_grpo":
            return "token_mean", rows * this.max_completion_length * steps
        if this.loss_type == "luspo":
            return "token_mean", rows * steps
        # the tokens of a generation on all ranks, of which one optimizer step sees a part
        share = steps / this.args.steps_per_generation if training else 1
        return "token_mean", inputs["num_items_in_batch"].clamp(min=1.0) / this.accelerator.num_processes * share

    def _log_distillation(self, logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> None:
        this: Any = self
        found = kdloss.diagnostics(logp, None, loss_mask=mask, teacher_logp=teacher_logp)
        sums = torch.stack([found["reverse_kl"] * found["tokens"], found["tokens"], found["teacher_neg_inf"]])
        reverse_kl, tokens, excluded = this.accelerator.reduce(sums.float(), reduction="sum").tolist()
        metrics = this._metrics["train" if this.model.training else "eval"]
        metrics["distill/reverse_kl"].append(reverse_kl / max(tokens, 1.0))
        metrics["distill/teacher_neg_inf"].append(excluded)

    def _check_setup(self, teacher_model: Any) -> None:
        this: Any = self
        _checks.one_of("args.loss_type", this.loss_type, _LOSS_TYPES)
        own_teacher = type(self).teacher_logps is not KDRLMixin.teacher_logps
        if teacher_model is None and self.distill_loss_weight != 0 and not own_teacher:
            raise ValueError(f"teacher_model must be given where distill_loss_weight is {self.distill_loss_weight}")
        if teacher_model is this.model:
            raise ValueError("teacher_model is the model that is trained: pass a copy, or its path")

    def _prepared_teacher(self, teacher: Any, init_kwargs: dict[str, Any]) -> Any:
        """Loaded, frozen, scoring at the sampling temperature, and placed as TRL places its reference."""
        this: Any = self
        utils = require("trl", **_TRL, module="trl.trainer.utils")
        models = require("trl", **_TRL, module="trl.models")
        if isinstance(teacher, str):
            teacher = utils.create_model_from_path(teacher, **init_kwargs)
        elif init_kwargs:
            raise ValueError("teacher_model_init_kwargs must be None beside a teacher_model that is loaded already")
        tokens, known = len(this._tokenizer), teacher.config.get_text_config().vocab_size
        if known < tokens:
            raise ValueError(f"teacher_model must know the student's {tokens} tokens, its vocabulary has {known}")
        teacher.requires_grad_(False).eval()
        utils.add_fused_lm_head(teacher, temperature=this.temperature)
        if this.is_deepspeed_enabled:
            return models.prepare_deepspeed(teacher, this.accelerator)
        if this.is_fsdp_enabled:
            return models.prepare_fsdp(teacher, this.accelerator)
        return this.accelerator.prepare_model(teacher, evaluation_mode=True)


def _completion_mask(inputs: dict[str, Any]) -> Tensor:  # (B, L) bool
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def _behaviour_logp(logp: Tensor, inputs: dict[str, Any]) -> Tensor | None:  # (B, L)
    """Of the policy that sampled; None where that is the one that is trained. vLLM leaves NaN where it has no score."""
    sampled, old = inputs.get("sampling_per_token_logps"), inputs.get("old_per_token_logps")
    if sampled is None:
        return old if isinstance(old, Tensor) else None
    return torch.where(sampled.isnan(), logp.detach() if old is None else old, sampled)


def generalized_jsd_loss(
    student_logits: Tensor,  # (B, L, V)
    teacher_logits: Tensor,  # (B, L, V)
    labels: Tensor | None = None,  # (B, L)
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:  # ()
    """In place of `GKDTrainer.generalized_jsd_loss`: beta 0 is the forward KL, 1 the reverse, between them the JSD.

    Computed in float32 whatever the logits are, and finite where a logit is -inf on both sides.

    Args:
        labels: -100 is ignored. None: every position counts.
        reduction: "batchmean" (over the labels that count; without labels over B, as TRL has it) or "sum".
        num_items_in_batch: the denominator where given, whatever the reduction.

    Raises:
        ValueError: another reduction. TRL's "mean" divides by V, too, and its "none" is not per token.
    """
    per_token = _divergence(student_logits, teacher_logits, beta=beta, temperature=temperature)
    mask = torch.ones_like(per_token, dtype=torch.bool) if labels is None else labels != -100
    if num_items_in_batch is not None:
        return kdloss.token_mean(per_token, loss_mask=mask, normalizer=_count(num_items_in_batch))
    if reduction == "sum":
        return kdloss.token_mean(per_token, loss_mask=mask, normalizer=1.0)
    if reduction != "batchmean":
        raise ValueError(f'reduction must be "batchmean" or "sum", got {reduction!r}: divide a sum as you need it')
    return kdloss.token_mean(per_token, loss_mask=mask, normalizer=max(1, len(per_token)) if labels is None else None)


def chunked_divergence_loss(
    student_hidden_states: Tensor,  # (B, L, D)
    teacher_hidden_states: Tensor,  # (B, L, D')
    student_lm_head_weight: Tensor,  # (V, D)
    teacher_lm_head_weight: Tensor,  # (V, D')
    completion_mask: Tensor,  # (B, L)
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,  # (V,)
    teacher_lm_head_bias: Tensor | None = None,  # (V,)
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """In place of DistillationTrainer's divergence from hidden states: (loss, sum of the entropies, tokens).

    Trained tokens only, on every device. The entropy is for TRL's metric; it takes one more product with the head.
    """
    weight, bias = _whole(student_lm_head_weight), _whole(student_lm_head_bias)
    teacher_weight, teacher_bias = _whole(teacher_lm_head_weight), _whole(teacher_lm_head_bias)
    mask = completion_mask.bool().flatten()
    hidden = student_hidden_states.flatten(0, -2)
    per_token = _divergence(
        hidden,
        weight,
        teacher_hidden_states.flatten(0, -2),
        teacher_weight,
        beta=beta,
        loss_mask=mask,
        bias=bias,
        teacher_bias=teacher_bias,
        softcap=student_final_logit_softcapping,
        teacher_softcap=teacher_final_logit_softcapping,
        logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        temperature=temperature,
    )
    with torch.no_grad():
        entropy = kdloss.linear_token_logprobs_and_entropy(
            hidden,
            weight,
            torch.zeros_like(mask, dtype=torch.int64),
            loss_mask=mask,
            bias=bias,
            softcap=student_final_logit_softcapping,
            logit_scale=student_logit_scale,
            temperature=temperature,
        ).entropy
    normalizer = None if num_items_in_batch is None else _count(num_items_in_batch)
    return kdloss.token_mean(per_token, loss_mask=mask, normalizer=normalizer), entropy.sum(), mask.sum()


def install_distillation() -> None:
    """DistillationTrainer takes `chunked_divergence_loss` from now on, in this process."""
    module = require("trl", **_TRL, module="trl.trainer.distillation_trainer")
    _replace(module, "_chunked_divergence_loss", chunked_divergence_loss)


def install_gkd() -> None:
    """GKDTrainer takes `generalized_jsd_loss` from now on, in this process."""
    trainer = require("trl", **_TRL, module="trl.experimental.gkd.gkd_trainer").GKDTrainer
    _replace(trainer, "generalized_jsd_loss", staticmethod(generalized_jsd_loss))


def _replace(owner: Any, name: str, ours: Any) -> None:
    if not hasattr(owner, name):
        raise ImportError(f"{owner.__name__} has no {name}: this version of TRL has moved it")
    setattr(owner, name, ours)


def _divergence(*tensors: Tensor, beta: float, **options: Any) -> Tensor:
    """The divergence that TRL's beta names: of two sets of logits, or of two pairs of hidden states and head."""
    name = "forward_kl" if beta == 0 else "reverse_kl" if beta == 1 else "generalized_jsd"
    if name == "generalized_jsd":
        options["beta"] = beta
    divergence: Callable[..., Tensor] = getattr(kdloss, name if len(tensors) == 2 else f"linear_{name}")
    return divergence(*tensors, **options)


def _count(tokens: Tensor | int) -> Tensor | float:
    return tokens.reshape(()) if isinstance(tokens, Tensor) else float(tokens)


def _whole(parameter: Any) -> Any:
    """A parameter, or None, as a plain tensor.

    FSDP2 hands over a DTensor where the head is sharded as a module of its own. The gradient is then the mean over the
    ranks, as FSDP2's own are; `full_tensor` by itself would give each shard what one rank's tokens say.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial  # a second to import, where nothing else has

    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def __getattr__(name: str) -> Any:
    """`KDRLTrainer` is made when it is first asked for, so that this module imports without TRL."""
    if name != "KDRLTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = require("trl", **_TRL).GRPOTrainer
    made = type(name, (KDRLMixin, base), {"__doc__": KDRLMixin.__doc__, "__module__": __name__})
    globals()[name] = made
    return made
