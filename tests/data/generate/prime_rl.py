"""What prime-rl's own `compute_loss` gives: `python tests/data/generate/prime_rl.py CHECKOUT/src`.

Made with 0.8.0 at 559b44772e471d1538537b8805cc77f3824a5e64, torch 2.13.0; needs beartype and jaxtyping beside torch.
Its trust regions are opened, so that they do not act; the drift penalty of its ref_kl (1e-3) cannot be switched off.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from _alone import draw, empty, enter, write

checkout = Path(sys.argv[1])
enter(checkout, "prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl")
empty("prime_rl.configs", "prime_rl.configs.trainer", "prime_rl.utils", "prime_rl.utils.utils")

prime_rl = importlib.import_module("prime_rl.trainer.rl.loss")

OPEN = SimpleNamespace(dppo_mask_low=10.0, dppo_mask_high=10.0, adv_tau=1.0, kl_tau=0.0)


def case(name: str, *, rl: bool, ref_kl: bool, weighted: bool, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    lengths, prompts = [6, 4, 9], [2, 1, 5]
    inputs: dict[str, list] = {
        "trainer": [],
        "inference": [],
        "ref": [],
        "advantages": [],
        "loss_mask": [],
        "weights": [],
    }
    for length, prompt in zip(lengths, prompts, strict=True):
        inference = -draw(generator, length).abs() - 0.5
        inputs["inference"].append(inference)
        inputs["trainer"].append((inference + 0.1 * draw(generator, length)).requires_grad_())
        inputs["ref"].append(-draw(generator, length).abs() - 0.5)
        inputs["advantages"].append(draw(generator, length))
        inputs["loss_mask"].append(torch.arange(length) >= prompt)
        inputs["weights"].append(draw(generator, length).abs() if weighted else torch.ones(length, dtype=torch.float64))
    nothing = [torch.zeros_like(x) for x in inputs["weights"]]
    loss, metrics = prime_rl.compute_loss(
        trainer_logprobs=inputs["trainer"],
        inference_logprobs=inputs["inference"],
        ref_logprobs=inputs["ref"],
        advantages=inputs["advantages"],
        loss_mask=inputs["loss_mask"],
        rl_weights=inputs["weights"] if rl else nothing,
        ce_weights=None,
        ref_kl_weights=[w * m for w, m in zip(inputs["weights"], inputs["loss_mask"], strict=True)] if ref_kl else None,
        rl_loss_fn=prime_rl.setup_rl_loss_fn(OPEN),
        rl_scale=11,
        ce_scale=1,
        ref_kl_scale=11,
    )
    for masked in ("is_masked", "ref_kl/is_masked"):
        assert masked not in metrics or not metrics[masked].any(), "a trust region acts"
    gradient = torch.autograd.grad(loss, inputs["trainer"])
    return {"name": name, "rl": rl, "ref_kl": ref_kl, "scale": 11, "inputs": inputs, "loss": loss, "gradient": gradient}


write(
    "prime-rl-0.8.0",
    "prime-rl 0.8.0, 559b44772e471d1538537b8805cc77f3824a5e64, src/prime_rl/trainer/rl/loss.py",
    [
        case("rl", rl=True, ref_kl=False, weighted=False, seed=0),
        case("rl, weighted", rl=True, ref_kl=False, weighted=True, seed=1),
        case("ref_kl", rl=False, ref_kl=True, weighted=False, seed=2),
        case("ref_kl, weighted", rl=False, ref_kl=True, weighted=True, seed=3),
        case("both", rl=True, ref_kl=True, weighted=False, seed=4),
        case("both, weighted", rl=True, ref_kl=True, weighted=True, seed=5),
    ],
)
