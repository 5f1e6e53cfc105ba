"""`KDRLConfig`: the hyperparameters of `kdrl_loss` as one frozen value, read from a YAML block."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from . import _checks
from ._packing.reductions import REDUCTIONS, Reduction

# Other keys of a `teacher:` block: settings of the engine that serves the teacher, under AReaL's names.
_ENGINE_KEYS = frozenset(
    {
        "archon",
        "attn_impl",
        "backend",
        "disable_dropout",
        "dtype",
        "enable_tree_training",
        "engine_type",
        "experiment_name",
        "fsdp",
        "grad_reduce_dtype",
        "gradient_checkpointing",
        "init_from_scratch",
        "is_critic",
        "log_level",
        "lora_alpha",
        "lora_rank",
        "mb_spec",
        "megatron",
        "offload",
        "optimizer",
        "optimizer_dtype",
        "pad_to_maximum",
        "path",
        "peft_type",
        "request_timeout",
        "rollout",
        "scheduling_spec",
        "scheduling_strategy",
        "setup_timeout",
        "target_modules",
        "temperature",
        "train",
        "trial_name",
        "use_kernels",
        "use_lora",
        "weight_update_mode",
    }
)


@dataclass(frozen=True)
class KDRLConfig:
    """The keywords of `kdrl_loss` that are hyperparameters, with its defaults. Tensors are passed beside it.

    Every value is checked when the config is created, so a typo fails before the first rollout.

    Attributes:
        rl_loss_weight: 0 skips the RL term: pure distillation.
        distill_loss_weight: 0 skips the distillation term. A required keyword; docs/weights.md says how to choose it.
        clip_low: distance of the lower bound of the RL ratio below 1, >= 0.
        clip_high: distance of the upper bound of the RL ratio above 1, >= 0.
        dual_clip: absolute bound of the RL ratio at negative advantages, > 1. None: no bound.
        kd_discount: 0 .. 1, the discount of returns of the distillation reward; 0 takes the reward of each token alone.
        kd_reward_clip: symmetric bound of the distillation reward in nats, > 0. None: no bound.
        kd_max_ratio: bound of the distillation ratio, > 0. None: no bound.
        reduction: "token_mean" or "sequence_mean".
        direct_penalty: descend logp - teacher_logp itself, for parity with trainers that do so.
        ignored: unused keys of the `teacher:` block (engine settings), unchanged.

    Raises:
        TypeError: distill_loss_weight is missing, or a value does not have its field's type (YAML reads `5e-3` as text:
            write `5.0e-3` or `0.005`).
        ValueError: a value is out of range, or `direct_penalty` is combined with a reward option.

    Example:
        >>> import torch, kdloss
        >>> block = {"kd_reward_clip": 0.5, "distill_loss_weight": 1.0, "path": "Qwen/Qwen3-32B"}
        >>> config = kdloss.KDRLConfig.from_mapping(block)
        >>> logp, teacher_logp, advantages = torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([0.0])
        >>> loss_mask, options = torch.tensor([True]), config.as_kwargs()
        >>> output = kdloss.kdrl_loss(logp, None, teacher_logp, advantages, loss_mask=loss_mask, **options)
        >>> output.loss.item(), config.ignored
        (0.5, {'path': 'Qwen/Qwen3-32B'})
    """

    rl_loss_weight: float = 1.0
    _: KW_ONLY
    distill_loss_weight: float
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kd_discount: float = 0.0
    kd_reward_clip: float | None = None
    kd_max_ratio: float | None = None
    reduction: Reduction = "token_mean"
    direct_penalty: bool = False
    ignored: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _checks.finite(rl_loss_weight=self.rl_loss_weight, distill_loss_weight=self.distill_loss_weight)
        _checks.ppo_clips(self.clip_low, self.clip_high, self.dual_clip)
        _checks.positive_or_none(kd_reward_clip=self.kd_reward_clip, kd_max_ratio=self.kd_max_ratio)
        _checks.unit_interval(kd_discount=self.kd_discount)
        _checks.one_of("reduction", self.reduction, REDUCTIONS)
        _checks.flag(direct_penalty=self.direct_penalty)
        if self.direct_penalty:
            _checks.no_reward_options(self.kd_discount, self.kd_reward_clip, self.kd_max_ratio)

    @classmethod
    def from_mapping(cls, block: Mapping[str, Any]) -> KDRLConfig:
        """Read the inside of a `teacher:` block unchanged.

        Args:
            block: field names of this class, which are used, and engine keys (`backend`, `path`, `mb_spec`, ...), which
                are kept in `ignored`.

        Returns:
            The checked config.

        Raises:
            TypeError: `block` is not a mapping, or a value does not have its field's type.
            ValueError: distill_loss_weight is missing, a value is out of range, or a key is neither a field nor an
                engine key; the message names the nearest valid key.
        """
        if not isinstance(block, Mapping):
            raise TypeError(f"block must be a mapping (the inside of `teacher:`), got {type(block).__name__}")
        names = cls._hyperparameters()
        for key in block:
            if key in names or key in _ENGINE_KEYS:
                continue
            nearest = difflib.get_close_matches(str(key), [*names, *sorted(_ENGINE_KEYS)], n=1, cutoff=0.0)
            raise ValueError(f"unknown key {key!r}; the nearest valid key is {nearest[0]!r}")
        if block.get("distill_loss_weight") is None:
            raise ValueError(f"block must hold distill_loss_weight: {_checks.CHOOSE_WEIGHT}")
        taken = {key: block[key] for key in block if key in names}
        return cls(**taken, ignored={key: block[key] for key in block if key in _ENGINE_KEYS})

    def as_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `kdrl_loss`, without `ignored`."""
        return {name: getattr(self, name) for name in self._hyperparameters()}

    @classmethod
    def _hyperparameters(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name != "ignored"]


KDRLConfig.__init__ = _checks.distill_loss_weight_required(KDRLConfig.__init__)  # type: ignore[method-assign]
