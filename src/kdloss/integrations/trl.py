"""TRL: `KDRLTrainer`, a GRPOTrainer with a teacher, and divergences that replace those of TRL's distillation trainers.

    trainer = KDRLTrainer(model, reward_funcs, args, ..., teacher_model="Qwen/Qwen3-8B", distill_loss_weight=1.0)

Everything of TRL's stays: generation, rewards, every loss type, metrics. The teacher scores the tokens once, after
generation. The distillation term uses the student's log-probs from TRL's own forward, and TRL's own denominator.
Layout: (B, L) right-padded completions; entry l belongs to completion token l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss import _checks
from kdloss._distributed.fsdp import gathered
from kdloss._docs import documented
from kdloss._packing.reductions import Reduction

from ._layout import row_cu_seqlens
from ._lazy import Hook, require
from ._texts import KDRL_ARGS

_LOSS_TYPES = ("grpo", "sapo", "bnpo", "dr_grpo", "cispo", "dapo", "vespo", "luspo")


@documented(KDRL_ARGS)
class KDRLMixin:
    """KDRL on top of a GRPOTrainer: rl_loss_weight * (TRL's loss) + distill_loss_weight * reverse KL to the teacher.

    `KDRLTrainer` applies this mixin to TRL's GRPOTrainer. For a GRPOTrainer of your own, write
    `class Mine(KDRLMixin, MyGRPOTrainer)`.

    Metrics: all of TRL's, plus `distill/reverse_kl` (nats per token, over all ranks) and `distill/teacher_neg_inf`
    (number of trained tokens that the teacher excludes: -inf, or a server's -9999).

    Args:
        *args, **kwargs: those of GRPOTrainer.
        teacher_model: a model, or a path or hub id to load one from. It is scored at `args.temperature`, like the
            student. The base model of a PEFT student is scored with the student's adapters disabled, and is not
            frozen; any other model that shares parameters with the student is refused. None is for subclasses that
            override `teacher_logps`, and for a `distill_loss_weight` of 0.
        teacher_model_init_kwargs: arguments for loading it, such as `{"dtype": "bfloat16"}`.
        distill_loss_weight: factor of the distillation term, required; an attribute, which a callback may change. 0
            leaves TRL's loss and gradient unchanged, and still logs the reverse KL. docs/weights.md says how to choose
            it.
        rl_loss_weight: factor of TRL's loss, including whatever TRL adds to it (the KL to the reference, the entropy
            bonus). 0 leaves it out.
        {kd_discount}
        {kd_reward_clip}
        {kd_max_ratio}
        {direct_penalty}

    Expected gradient:
        rl_loss_weight * (that of TRL's loss) + distill_loss_weight * (that of `kdloss.distillation_loss`), over the
        denominator of `args.loss_type`. The ratio of the second term is against the policy that sampled: vLLM's
        log-probs if TRL has them, else `old_per_token_logps`. TRL's clip, its masks by entropy or off-policyness, and
        its importance weights act on the RL term only.

    Raises:
        TypeError: distill_loss_weight is missing.
        ImportError: TRL is missing, or lacks what the adapter needs.
        ValueError: an option is out of range, `args.loss_type` is unknown, or the teacher is missing, is the trained
            model, shares parameters with it, or lacks some of its tokens.
        NotImplementedError: the batch contains images.
    """

    @_checks.distill_loss_weight_required
    def __init__(
        self,
        *args: Any,
        teacher_model: Any = None,
        teacher_model_init_kwargs: dict[str, Any] | None = None,
        distill_loss_weight: float,
        rl_loss_weight: float = 1.0,
        kd_discount: float = 0.0,
        kd_reward_clip: float | None = None,
        kd_max_ratio: float | None = None,
        direct_penalty: bool = False,
        **kwargs: Any,
    ) -> None:
        _trl()
        self.teacher_model = None
        self._teacher_is_base = False
        self.distill_loss_weight = distill_loss_weight
        self.rl_loss_weight = rl_loss_weight
        # KDRLConfig checks the ranges and the combinations of options
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
        """Log-probs of the completion tokens under the teacher.

        Override this for a teacher that is not a local model, such as a scoring server.

        Args:
            inputs: TRL's result of one generation: `prompt_ids`, `prompt_mask` (left-padded), `completion_ids`,
                `completion_mask` (right-padded).

        Returns:
            (B, L), nats; values where `completion_mask` is 0 are never read. None without a teacher.
        """
        this: Any = self
        if this.teacher_model is None:
            return None
        trainer: Any = super()
        args, training = this.args, this.model.training
        with torch.no_grad(), self._teacher_to_score() as teacher:
            logps: Tensor = trainer._get_per_token_logps_and_entropies(
                teacher,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].shape[1],
                batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            )[0]
        return logps

    @contextmanager
    def _teacher_to_score(self) -> Iterator[Any]:
        """The teacher in eval mode; the student without its adapters, where the teacher is its base model."""
        this: Any = self
        if not self._teacher_is_base:
            yield self.teacher_model
            return
        student, training = this.accelerator.unwrap_model(this.model), this.model.training
        with student.disable_adapter():
            this.model.eval()
            try:
                yield this.model
            finally:
                this.model.train(training)

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
        # a weight of 0 leaves the term out of the graph, so its NaNs cannot leak
        return self.distill_loss_weight * kd + (0 if self.rl_loss_weight == 0 else self.rl_loss_weight * loss)

    def _take_scored(self) -> Tensor:
        """The log-probs of TRL's own forward; the reference to them is dropped here."""
        scored, self._scored = self._scored, None
        if scored is None:
            raise RuntimeError("TRL's loss did not call _get_per_token_logps_and_entropies: its hook has moved")
        return scored

    def _distillation(self, logp: Tensor, teacher_logp: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
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
            cu_seqlens=row_cu_seqlens(logp),
            **self._kd_options,
        ).loss

    def _denominator(self, mask: Tensor, inputs: dict[str, Any]) -> tuple[Reduction, float | Tensor]:
        """TRL's reduction of `loss_type` as (reduction, normalizer), so micro-batches add up as TRL's do."""
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
        # num_items_in_batch counts the tokens of a whole generation on all ranks; a step sees a part of them
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
        if not isinstance(teacher_model, torch.nn.Module):
            return
        of_peft = getattr(this.model, "disable_adapter", None) is not None
        self._teacher_is_base = of_peft and teacher_model is this.model.get_base_model()
        trained = set(map(id, this.model.parameters()))
        shared = [name for name, x in teacher_model.named_parameters() if id(x) in trained]
        if shared and not self._teacher_is_base:
            raise ValueError(
                f"teacher_model must share no parameters with the model that is trained, got {len(shared)} that it "
                f"does, such as {shared[0]}: pass a copy made before the trainer, copy.deepcopy(teacher_model), or its "
                "path"
            )

    def _prepared_teacher(self, teacher: Any, init_kwargs: dict[str, Any]) -> Any:
        """The teacher, loaded, frozen, scoring at the sampling temperature, and placed like TRL's reference model."""
        this: Any = self
        utils = _trl("trl.trainer.utils")
        models = _trl("trl.models")
        if isinstance(teacher, str):
            teacher = utils.create_model_from_path(teacher, **init_kwargs)
        elif init_kwargs:
            raise ValueError("teacher_model_init_kwargs must be None with a teacher_model that is already loaded")
        tokens, known = len(this._tokenizer), teacher.config.get_text_config().vocab_size
        if known < tokens:
            raise ValueError(f"teacher_model must know the student's {tokens} tokens, but its vocabulary has {known}")
        if self._teacher_is_base:  # it is trained, placed and given its temperature as part of the student
            return teacher
        teacher.requires_grad_(False).eval()
        utils.add_fused_lm_head(teacher, temperature=this.temperature)
        if this.is_deepspeed_enabled:
            return models.prepare_deepspeed(teacher, this.accelerator)
        if this.is_fsdp_enabled:
            return models.prepare_fsdp(teacher, this.accelerator)
        return this.accelerator.prepare_model(teacher, evaluation_mode=True)


def _completion_mask(inputs: dict[str, Any]) -> Tensor:  # (B, L) bool
    """True at the completion tokens that the student sampled."""
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def _behaviour_logp(logp: Tensor, inputs: dict[str, Any]) -> Tensor | None:  # (B, L)
    """Log-probs of the policy that sampled; None if it is the current one. Replaces NaN, vLLM's missing score."""
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
    """Replacement of `GKDTrainer.generalized_jsd_loss`: forward KL at beta 0, reverse KL at 1, the JSD in between.

    Computed in float32 for logits of any lower precision, and finite where a logit is -inf on both sides.

    Args:
        student_logits: of the student, any floating dtype. Differentiable.
        teacher_logits: of the teacher. Detached.
        labels: -100 is ignored. None: every position counts.
        beta: 0 .. 1.
        temperature: > 0; both logits are divided by it.
        reduction: "batchmean" (the mean over the labels that count; without labels the sum over B, as in TRL), or
            "sum".
        num_items_in_batch: the denominator; overrides `reduction`. None: by `reduction`.

    Returns:
        () the reduced divergence, in nats.

    Expected gradient:
        The exact gradient of the divergence of every next-token distribution, for the student's logits.

    Raises:
        ValueError: another reduction. TRL's "mean" also divides by V, and its "none" is not per token.
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
    """Replacement of DistillationTrainer's divergence from hidden states, computed at trained tokens only.

    Args:
        student_hidden_states: of the student, entry l at the position that predicts token l. Differentiable.
        teacher_hidden_states: of the teacher, at the same positions. Detached.
        student_lm_head_weight: the student's output head. Differentiable; may be a DTensor.
        teacher_lm_head_weight: the teacher's output head. Detached; may be a DTensor.
        completion_mask: nonzero where a token is trained on.
        beta: 0 .. 1: the forward KL at 0, the reverse KL at 1, the JSD in between.
        num_items_in_batch: the denominator. None: the number of trained tokens.
        student_lm_head_bias, teacher_lm_head_bias: biases of the heads. None: no bias.
        student_logit_scale, teacher_logit_scale: factors of the logits, before the softcap.
        student_final_logit_softcapping, teacher_final_logit_softcapping: c > 0: logits become c * tanh(logits / c).
            None: no softcap.
        temperature: > 0; all logits are divided by it.

    Returns:
        The reduced divergence, (), in nats; the sum of the student's entropies, detached, for TRL's metric (this takes
        one more product with the head); and the number of trained tokens.

    Expected gradient:
        The exact gradient of the divergence at the trained tokens, for the student's hidden states, head and bias.
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


def topk_sampled_reverse_kl_loss(
    self: Any,
    teacher_result: dict[str, Tensor],
    student_log_probs: Tensor,  # (B, L, V)
    completion_tokens: Tensor,  # (B, L)
    labels: Tensor,  # (B, L)
) -> Tensor:  # ()
    """Replacement of ServerDistillationTrainer's loss for beta 1: `kdloss.topk_sampled_reverse_kl`.

    Exact on the server's top k, and sampled for the rest of the vocabulary. TRL's own loss takes the sampled token as
    its support, so the support depends on the sample, and the gradient is not that of the reverse KL.

    Args:
        self: the ServerDistillationTrainer. k is its `loss_top_k`, an attribute; TRL's configuration allows 1 alone
            with beta 1.
        teacher_result: what the server answered: `actual_logprobs` (B, L), the log-probs of the completion tokens, and
            its top k as `topk_logprobs` and `topk_token_ids` (B, L, k), where -inf is padding.
        student_log_probs: of the student, entry l at the position that predicts token l. Differentiable.
        completion_tokens: the sampled tokens.
        labels: -100 where a token is not trained on.

    Returns:
        () nats, the mean over the trained tokens of the micro-batch, as in TRL.

    Expected gradient:
        grad KL(q || p) of every next-token distribution, at the prefixes that the student visits, for any k. The tokens
        must come from the student as it is, at top_p 1 and top_k 0: a policy that samples less is not corrected for.

    Raises:
        ValueError: beta is between 0 and 1, the temperature is not 1, or the server gave no log-prob of a trained
            token.
    """
    if self.beta != 1:
        raise ValueError(f"args.beta must be 0 or 1 after install_server_distillation, got {self.beta}")
    if self.temperature != 1:
        raise ValueError(
            f"args.temperature must be 1 after install_server_distillation, got {self.temperature}: a vLLM server "
            "scores prompts at 1, and distributions at two temperatures differ"
        )
    mask = labels != -100
    teacher_logp, topk_logp = teacher_result["actual_logprobs"], teacher_result["topk_logprobs"]
    unscored = int((mask & ~teacher_logp.isfinite()).sum())
    if unscored:
        raise ValueError(f"the server gave no log-prob of {unscored} completion tokens that are trained on")
    per_token = kdloss.topk_sampled_reverse_kl(
        student_log_probs,
        torch.where(mask, completion_tokens, -100),
        teacher_logp,
        topk_logp,
        torch.where(topk_logp.isfinite(), teacher_result["topk_token_ids"], -1),
    )
    return kdloss.token_mean(per_token, loss_mask=mask)


def install_distillation() -> None:
    """Make TRL's DistillationTrainer use `chunked_divergence_loss`, in this process.

    Raises:
        ImportError: TRL is missing, or lacks what the adapter needs.
    """
    module = _trl("trl.trainer.distillation_trainer")
    _replace(module, "_chunked_divergence_loss", chunked_divergence_loss)


def install_server_distillation() -> None:
    """Make TRL's ServerDistillationTrainer use `topk_sampled_reverse_kl_loss` where beta is 1, in this process.

    Raises:
        ImportError: TRL is missing, or lacks what the adapter needs.
    """
    trainer = _trl("trl.experimental.server_distillation.server_distillation_trainer").ServerDistillationTrainer
    _replace(trainer, "_compute_server_sparse_top_1_divergence_loss", topk_sampled_reverse_kl_loss)


def install_gkd() -> None:
    """Make TRL's GKDTrainer use `generalized_jsd_loss`, in this process.

    Raises:
        ImportError: TRL is missing, or lacks what the adapter needs.
    """
    trainer = _trl("trl.experimental.gkd.gkd_trainer").GKDTrainer
    _replace(trainer, "generalized_jsd_loss", staticmethod(generalized_jsd_loss))


def _replace(owner: Any, name: str, ours: Any) -> None:
    if not hasattr(owner, name):
        raise ImportError(f"{owner.__name__} has no {name}: this version of TRL has moved it")
    setattr(owner, name, ours)


def _divergence(*tensors: Tensor, beta: float, **options: Any) -> Tensor:
    """The divergence for TRL's beta, between two logits, or between two pairs of hidden states and head."""
    name = "forward_kl" if beta == 0 else "reverse_kl" if beta == 1 else "generalized_jsd"
    if name == "generalized_jsd":
        options["beta"] = beta
    divergence: Callable[..., Tensor] = getattr(kdloss, name if len(tensors) == 2 else f"linear_{name}")
    return divergence(*tensors, **options)


def _count(tokens: Tensor | int) -> Tensor | float:
    return tokens.reshape(()) if isinstance(tokens, Tensor) else float(tokens)


def _whole(parameter: Any) -> Any:
    """A parameter, or None, as a plain tensor: FSDP2 passes a DTensor if the head is sharded as a module of its own."""
    return gathered(parameter) if _checks.is_dtensor(parameter) else parameter


def __getattr__(name: str) -> Any:
    """Create `KDRLTrainer` on first access, so that this module imports without TRL."""
    if name != "KDRLTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = _trl().GRPOTrainer
    made = type(name, (KDRLMixin, base), {"__doc__": KDRLMixin.__doc__, "__module__": __name__})
    globals()[name] = made
    return made


_SAMPLED = ("old_per_token_logps", "sampling_per_token_logps", "tool_mask", "num_items_in_batch")
_HOOKS = {
    "trl": {
        "GRPOTrainer._compute_loss": Hook(takes=("model", "inputs"), keys=("completion_mask", *_SAMPLED)),
        "GRPOTrainer._generate_and_score_completions": Hook(
            takes=("inputs",),
            keys=("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_images", *_SAMPLED),
        ),
        "GRPOTrainer._get_per_token_logps_and_entropies": Hook(
            takes=("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")
        ),
    },
    "trl.trainer.utils": {"create_model_from_path": Hook(), "add_fused_lm_head": Hook(takes=("temperature",))},
    "trl.models": {"prepare_deepspeed": Hook(), "prepare_fsdp": Hook()},
    "trl.trainer.distillation_trainer": {"_chunked_divergence_loss": Hook(replaced_by=chunked_divergence_loss)},
    "trl.experimental.server_distillation.server_distillation_trainer": {
        "ServerDistillationTrainer._compute_server_sparse_top_1_divergence_loss": Hook(
            replaced_by=topk_sampled_reverse_kl_loss
        ),
        "ServerDistillationTrainer._get_teacher_token_logprobs_from_server": Hook(
            keys=("actual_logprobs", "topk_logprobs", "topk_token_ids")
        ),
    },
    "trl.experimental.gkd.gkd_trainer": {"GKDTrainer.generalized_jsd_loss": Hook(replaced_by=generalized_jsd_loss)},
}


def _trl(module: str = "trl") -> Any:
    return require("trl", at_least="1.16", below="1.17", module=module, hooks=_HOOKS)
