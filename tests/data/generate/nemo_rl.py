"""What NeMo-RL's own `ClippedPGLossFn` gives: `python tests/data/generate/nemo_rl.py CHECKOUT`.

Made with v0.7.0, 81aa43dda4765b0429cf31dab44441e4e4383911, torch 2.13.0; needs pydantic beside torch. Main at
7ea279abfbeb698b092856d0dab61e7cf39bc909, which calls itself 0.6.0, gives the same file. v0.6.0, whose configuration is
a dict without defaults, gives the same losses and gradients, and lacks two metrics. Only the loss and its masked mean
are run; what they import of the rest is empty.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from _alone import draw, empty, enter, write

enter(Path(sys.argv[1]), "nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss")
empty(
    "nemo_rl.algorithms.x_token",
    "nemo_rl.algorithms.x_token.loss_utils",
    "nemo_rl.distributed",
    "nemo_rl.distributed.batched_data_dict",
    "nemo_rl.distributed.model_utils",
    "nemo_rl.models",
    "nemo_rl.models.dtensor",
    "nemo_rl.models.dtensor.parallelize",
    "nemo_rl.algorithms.logits_sampling_utils",
    "nemo_rl.data",
    "nemo_rl.data.chat_templates",
    "nemo_rl.data.interfaces",
    "nemo_rl.models.policy",
    "nemo_rl.utils",
    "nemo_rl.utils.fastokens",
    "nemo_rl.utils.logger",
    "transformers",
)

nemo_rl = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")


DEFAULTS_OF_A_DICT = {  # 0.6's configuration has none of its own; these are those of 0.7
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "ratio_clip_c": None,
    "ratio_clip_max": 0.2,
    "ratio_clip_min": 0.2,
    "reference_policy_kl_penalty": 0.0,
    "reference_policy_kl_type": "k3",
    "token_level_loss": True,
    "truncated_importance_sampling_ratio": None,
    "use_importance_sampling_correction": False,
    "use_on_policy_kl_approximation": False,
}


def case(name: str, *, seed: int, **settings: object) -> dict:
    generator = torch.Generator().manual_seed(seed)
    generation = -draw(generator, 4, 7).abs() - 0.1
    prev = generation + 0.3 * draw(generator, 4, 7)
    logp = (prev + 0.4 * draw(generator, 4, 7))[:, 1:].clone().requires_grad_()
    data = {
        "input_ids": torch.zeros(4, 7, dtype=torch.long),
        "advantages": draw(generator, 4, 7),
        "prev_logprobs": prev,
        "generation_logprobs": generation,
        "token_mask": ((torch.arange(7) >= 2) & (torch.arange(7) < torch.tensor([7, 4, 6, 5])[:, None])).double(),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
    }
    if hasattr(nemo_rl.ClippedPGLossConfig, "model_fields"):
        config = nemo_rl.ClippedPGLossConfig(reference_policy_kl_penalty=0.0, **settings)
    else:
        config = {**DEFAULTS_OF_A_DICT, **settings}
    counts = {"global_valid_seqs": torch.tensor(8.0), "global_valid_toks": torch.tensor(30.0)}
    loss, metrics = nemo_rl.ClippedPGLossFn(config)(next_token_logprobs=logp, data=data, **counts)
    gradient = torch.autograd.grad(loss, logp)[0]
    return {
        "name": name,
        "settings": settings,
        "logprobs": logp,
        "data": data,
        "counts": counts,
        "loss": loss,
        "metrics": metrics,
        "gradient": gradient,
    }


tis = {
    "use_importance_sampling_correction": True,
    "truncated_importance_sampling_type": "tis",
    "truncated_importance_sampling_ratio": 1.2,
}
write(
    "nemo-rl-0.7.0",
    "NeMo-RL v0.7.0, 81aa43dda4765b0429cf31dab44441e4e4383911, nemo_rl/algorithms/loss/loss_functions.py",
    [
        case("by token", seed=0),
        case("by sequence", seed=1, token_level_loss=False),
        case("clips", seed=2, ratio_clip_min=0.1, ratio_clip_max=0.3, ratio_clip_c=1.4),
        case("tis", seed=3, **tis),
        case("tis by sequence", seed=4, token_level_loss=False, **tis),
    ],
)
