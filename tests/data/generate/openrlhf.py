"""What OpenRLHF's own `PolicyLoss` gives: `python tests/data/generate/openrlhf.py FOLDER`, its wheel unzipped in it.

Made with openrlhf 0.11.2 (pip download --no-deps openrlhf==0.11.2), torch 2.13.0. The wheel has its packages in
`openrlhf-0.11.2.data/purelib`; a FOLDER with `openrlhf` itself, a checkout or an installation, serves as well.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from _alone import draw, empty, enter, write

folder = Path(sys.argv[1])
unzipped = [folder, *folder.glob("*.data/purelib")]
enter(next(x for x in unzipped if (x / "openrlhf").is_dir()), "openrlhf", "openrlhf.models")
empty("deepspeed")

openrlhf = importlib.import_module("openrlhf.models.loss")


def case(name: str, *, step: bool = False, seed: int = 0, spread: float = 0.4, **settings: object) -> dict:
    generator = torch.Generator().manual_seed(seed)
    rollout = -draw(generator, 4, 6).abs() - 0.1
    old = rollout + 0.3 * draw(generator, 4, 6)
    logp = (old + spread * draw(generator, 4, 6)).requires_grad_()
    inputs = {
        "log_probs": logp,
        "old_log_probs": old,
        "advantages": draw(generator, 4, 6),
        "action_mask": (torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]).double(),
        "rollout_log_probs": rollout,
    }
    info = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 9.0} if step else {}
    out = openrlhf.PolicyLoss(**settings)(**inputs, **info)
    gradient = torch.autograd.grad(out[0], logp)[0]
    return {"name": name, "settings": settings, "inputs": inputs, "info": info, "out": out, "gradient": gradient}


def corrected(level: str, mode: str, low: float, high: float) -> dict:
    return {"is_correction_level": level, "is_correction_mode": mode, "is_correction_threshold": [low, high]}


write(
    "openrlhf-0.11.2",
    "openrlhf 0.11.2, openrlhf/models/loss.py",
    [
        case("ppo"),
        case("ppo, step", step=True, seed=1),
        case("ppo, asymmetric, dual clip", clip_eps_low=0.1, clip_eps_high=0.3, dual_clip=1.4, seed=2),
        case("ppo by sample", token_level_loss=False, seed=3),
        case("ppo by sample, step", token_level_loss=False, step=True, seed=4),
        case("token mask", **corrected("token", "mask", 0.8, 1.3), seed=5),
        case("token clip", **corrected("token", "clip", 0.8, 1.3), seed=6),
        case("sequence mask", **corrected("seq", "mask", 0.9, 1.2), seed=7),
        case("gspo", policy_loss_type="gspo", clip_eps_low=0.05, clip_eps_high=0.05, spread=0.2, seed=8),
        case("gspo, corrected", policy_loss_type="gspo", **corrected("token", "mask", 0.5, 5.0), step=True, seed=9),
    ],
)
