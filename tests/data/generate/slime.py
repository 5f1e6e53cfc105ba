"""What slime's own `policy_loss_function` gives: `TORCHDYNAMO_DISABLE=1 python tests/data/generate/slime.py CHECKOUT`.

Made with main at 624b824a898ab0ec1fcb4d373004c7f3852bf515, 38 commits after v0.3.1, and torch 2.13.0. v0.3.1 itself
gives the same but for the dual clip: it takes --eps-clip-c and does not pass it on. One rank, so no Megatron is needed.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import torch
from _alone import draw, empty, enter, write

enter(Path(sys.argv[1]), "slime", "slime.backends", "slime.backends.megatron_utils", "slime.utils")
one_rank = Namespace(get_context_parallel_world_size=lambda: 1, get_tensor_model_parallel_group=lambda: None)
empty("megatron", "megatron.core", mpu=one_rank)
empty("slime.utils.distributed_utils", "slime.utils.misc", "slime.utils.types")

slime = importlib.import_module("slime.backends.megatron_utils.loss")

ARGS = {
    "advantage_estimator": "grpo",
    "allgather_cp": False,
    "custom_tis_function_path": None,
    "entropy_coef": 0.0,
    "eps_clip": 0.2,
    "eps_clip_c": None,
    "eps_clip_high": 0.28,
    "get_mismatch_metrics": False,
    "log_probs_chunk_size": -1,
    "opd_kl_coef": 0.0,
    "opd_type": "sglang",
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "use_kl_loss": False,
    "use_opd": False,
    "use_opsm": False,
    "use_rollout_logprobs": False,
    "use_tis": False,
}


def case(name: str, *, seed: int, per_token: bool = False, on_policy: bool = False, **changed: object) -> dict:
    args = Namespace(**{**ARGS, "calculate_per_token_loss": per_token, **changed})
    generator = torch.Generator().manual_seed(seed)
    totals, responses, vocabulary = [6, 4, 8], [4, 2, 3], 11

    def stream(scale: float) -> list[torch.Tensor]:
        return [scale * draw(generator, n, dtype=torch.float32) for n in responses]

    logits = (2 * draw(generator, 1, sum(totals), vocabulary, dtype=torch.float32)).requires_grad_()
    masks = [torch.ones(n, dtype=torch.int32) for n in responses]
    masks[0][1] = 0
    batch = {
        "unconcat_tokens": [torch.randint(vocabulary, (n,), generator=generator) for n in totals],
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": masks,
        "rollout_mask_sums": torch.stack([m.sum() for m in masks]),
        "advantages": stream(1.0),
    }
    _, scored = slime.get_log_probs_and_entropy(
        logits, args=args, **{k: batch[k] for k in ("unconcat_tokens", "total_lengths", "response_lengths")}
    )
    logp = [x.detach() for x in scored["log_probs"]]
    batch["log_probs"] = logp if on_policy else [x + d for x, d in zip(logp, stream(0.3), strict=True)]
    batch["rollout_log_probs"] = (
        logp if on_policy else [x + d for x, d in zip(batch["log_probs"], stream(0.2), strict=True)]
    )
    batch["teacher_log_probs"] = [x + d for x, d in zip(logp, stream(0.8), strict=True)]
    given = {**batch, "advantages": list(batch["advantages"])}
    if args.use_opd:
        slime.apply_opd_kl_to_advantages(args, batch, batch["advantages"], batch["log_probs"])
    lengths = (totals, responses, masks, batch["rollout_mask_sums"])
    loss, reported = slime.policy_loss_function(args, batch, logits, slime.get_sum_of_sample_mean(*lengths, per_token))
    gradient = torch.autograd.grad(loss, logits)[0]
    return {
        "name": name,
        "args": vars(args),
        "per_token": per_token,
        "batch": given,
        "logits": logits,
        "loss": loss,
        "reported": reported,
        "gradient": gradient,
    }


write(
    "slime-624b824",
    "slime main, 624b824a898ab0ec1fcb4d373004c7f3852bf515, 38 commits after v0.3.1, "
    "slime/backends/megatron_utils/loss.py",
    [
        case("ppo", seed=0),
        case("ppo per token", seed=1, per_token=True),
        case("dual clip, entropy", seed=2, eps_clip_c=1.4, entropy_coef=0.02),
        case("temperature", seed=3, rollout_temperature=0.7),
        case("tis", seed=4, use_tis=True, tis_clip=1.2, tis_clip_low=0.9),
        case("rollout log-probs", seed=5, use_rollout_logprobs=True),
        case("opd, on-policy", seed=6, on_policy=True, use_opd=True, opd_kl_coef=0.7),
        case("opd, on-policy, per token", seed=7, on_policy=True, use_opd=True, opd_kl_coef=0.7, per_token=True),
    ],
)
