"""Tests the adapter against AReaL's own `grpo_loss_fn`: loss, gradient and every statistic, in each mode.

Tolerance: rtol 2e-5 in float32, about a hundred roundings of sums and exponentials.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from areal.api.cli_args import RejectionSamplingConfig
from areal.trainer.ppo import actor
from areal.utils import stats_tracker
from areal.utils.data import concat_batch, pack_tensor_dict
from torch import Tensor

import kdloss
from kdloss.integrations import areal
from kdloss.testing import SequenceTree, expected_gradient

THEIRS = actor.grpo_loss_fn
CLIPS = {"eps_clip": 0.2, "eps_clip_higher": 0.28, "c_clip": None}


def rejection(level: str, action: str, metric: str, agg: str, upper: float, lower: float | None) -> dict[str, Any]:
    config = RejectionSamplingConfig(level=level, action=action, metric=metric, agg=agg, upper=upper, lower=lower)
    return {"rejection_sampling": config, "use_decoupled_loss": True}


DECOUPLED: dict[str, dict[str, Any]] = {
    "decoupled": {"use_decoupled_loss": True},
    "symmetric clip": {"eps_clip_higher": None},
    "dual clip": {"c_clip": 1.3},
    "gspo": {"importance_sampling_level": "sequence", "eps_clip": 0.02, "eps_clip_higher": 0.03},
    "gspo, dual clip": {"importance_sampling_level": "sequence", "c_clip": 1.05},
    "gspo, rejection": {
        "importance_sampling_level": "sequence",
        **rejection("token", "mask", "ratio", "mean", 1.2, 0.7),
    },
    **{
        f"{level} {action} {metric} {agg}": rejection(level, action, metric, agg, upper, lower)
        for level, action, metric, agg, upper, lower in [
            ("token", "mask", "ratio", "mean", 1.2, 0.6),
            ("token", "mask", "ratio", "mean", 1.5, None),
            ("token", "clamp", "ratio", "mean", 1.2, 0.6),
            ("token", "mask", "kl_k1", "mean", 0.2, -0.4),
            ("token", "mask", "kl_k2", "mean", 0.05, None),
            ("token", "mask", "kl_k3", "mean", 0.05, None),
            ("sequence", "mask", "ratio", "mean", 1.02, 0.5),
            ("sequence", "mask", "ratio", "sum", 1.1, 0.5),
            ("sequence", "mask", "ratio", "max", 1.6, None),
            ("sequence", "clamp", "ratio", "mean", 1.01, 0.99),
            ("sequence", "clamp", "ratio", "sum", 1.1, 0.9),
            ("sequence", "mask", "kl_k1", "sum", 0.1, None),
            ("sequence", "mask", "kl_k2", "max", 0.2, None),
            ("sequence", "mask", "kl_k3", "mean", 0.04, None),
        ]
    },
}
COUPLED: dict[str, dict[str, Any]] = {
    "ppo": {},
    "sapo": {"use_sapo_loss": True, "sapo_tau_pos": 0.8, "sapo_tau_neg": 1.3},
    "sapo by sequence": {"use_sapo_loss": True, "importance_sampling_level": "sequence"},
}
TEACHERS = {"no teacher": None, "distillation": (0.0, 0.7), "joint": (0.8, 0.05)}


def trajectories(*, seed: int = 0) -> list[dict[str, Any]]:
    """As after `compute_advantages`: prompt and response in one row, rolled to prediction positions."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, response in [(2, 3), (3, 6), (1, 4), (4, 1), (2, 8), (5, 5)]:
        length = prompt + response
        own_mask = torch.arange(length) >= prompt
        loss_mask = torch.roll(own_mask.float(), -1)
        old = -torch.rand(length, generator=generator) * 3 * loss_mask
        row = {
            "input_ids": torch.randint(50, (length,), generator=generator),
            "attention_mask": torch.ones(length, dtype=torch.bool),
            "loss_mask": loss_mask,
            "logprobs": old,
            "prox_logp": old + 0.3 * torch.randn(length, generator=generator),
            "advantages": torch.randn(length, generator=generator),
            "teacher_logp": -torch.rand(length, generator=generator) * 3,
            "versions": torch.where(own_mask, 3, -1),
        }
        rows.append({name: x[None] for name, x in row.items()})
    return rows


def batch(layout: str, *, coupled: bool, weights: tuple[float, float] | None) -> dict[str, Any]:
    rows = trajectories()
    for row in rows:
        if coupled:
            row["prox_logp"] = row["logprobs"]
        del row["versions"]
        if weights is None:
            del row["teacher_logp"]
        else:
            row["rl_loss_weight"], row["distill_loss_weight"] = weights
    data, _ = concat_batch(rows)
    return pack_tensor_dict(data) if layout == "packed" else data


def student(data: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return data["prox_logp"] + 0.25 * torch.randn(data["prox_logp"].shape, generator=generator)


def run(function: Any, data: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    logp = student(data).requires_grad_()
    loss = function(logp, -logp, data, **{"current_version": 4, **CLIPS, **options})
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, stats_tracker.export()


def check(mine: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(mine[0], theirs[0], rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(mine[1], theirs[1], rtol=2e-5, atol=2e-5 * float(theirs[1].abs().max()))
    assert mine[2] == pytest.approx(theirs[2], rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("mode", [*COUPLED, *DECOUPLED])
def test_every_mode_is_areals_own(mode: str, teacher: str, layout: str) -> None:
    data = batch(layout, coupled=mode in COUPLED, weights=TEACHERS[teacher])
    options = COUPLED.get(mode, DECOUPLED.get(mode))
    extremes = {"vocab_min_logits": torch.zeros_like(data["prox_logp"]), "vocab_max_logits": data["prox_logp"].exp()}
    theirs = run(THEIRS, data, **options, **extremes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # direct_penalty warns; here it is intended
        literal = functools.partial(areal.grpo_loss_fn, direct_penalty=True)
        check(run(literal, data, **options, **extremes), theirs)
    mine = run(areal.grpo_loss_fn, data, **options, **extremes)
    if teacher == "joint":  # AReaL gets this gradient wrong
        assert (mine[1] - theirs[1]).abs().max() > 1e-3
        assert mine[2] == pytest.approx(theirs[2], rel=2e-5, abs=1e-6)
    else:
        check(mine, theirs)


def test_m2po_is_areals_but_for_a_denominator_that_its_mask_shrinks() -> None:
    data = batch("packed", coupled=False, weights=(0.0, 0.7))
    trained = data["loss_mask"].count_nonzero()
    for threshold in (1e-4, 0.02, 0.05, 1.0):
        kept = actor._apply_m2po_masking(data["logprobs"], data["prox_logp"], data["loss_mask"].bool(), threshold).sum()
        for options in ({}, {"importance_sampling_level": "sequence"}):
            loss, gradient, stats = run(THEIRS, data, m2_threshold=threshold, **options)
            theirs = (loss * kept / trained, gradient * kept / trained, stats)
            check(run(areal.grpo_loss_fn, data, m2_threshold=threshold, **options), theirs)


@pytest.mark.parametrize("method", ["loglinear", "metrics"])
def test_the_proximal_policy_is_areals_with_versions_in_place(method: str) -> None:
    data, _ = concat_batch(trajectories())
    del data["teacher_logp"]
    generator = torch.Generator().manual_seed(7)
    versions = torch.where(data["versions"] >= 0, torch.randint(4, data["versions"].shape, generator=generator), -1)
    if method == "loglinear":
        del data["prox_logp"]
    logp = data["logprobs"] + 0.3 * torch.randn(data["logprobs"].shape, generator=generator)

    def run(function: Any, versions: Tensor) -> tuple:
        x = logp.clone().requires_grad_()
        loss = function(x, -x, data | {"versions": versions}, **CLIPS, current_version=4, prox_logp_method=method)
        return loss.detach(), torch.autograd.grad(loss, x)[0], stats_tracker.export()

    mine = run(areal.grpo_loss_fn, versions)
    check(mine, run(THEIRS, torch.roll(versions, -1, -1)))
    late = run(THEIRS, versions)  # as AReaL leaves them
    if method == "loglinear":
        assert (mine[1] - late[1]).abs().max() > 1e-4
    else:
        assert mine[2]["version_stats/n_valid_generated_tokens"] > late[2]["version_stats/n_valid_generated_tokens"]


def test_what_the_joint_mode_descends() -> None:
    """Enumerates every outcome, without reward: AReaL's teacher has no gradient, the adapter's the reverse KL's."""
    tree = SequenceTree(vocab_size=3, max_length=2, garbage=0.0)

    def expected(function: Any, under: str) -> Tensor:
        def loss(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
            stream = {"logprobs": old_logp, "prox_logp": old_logp, "teacher_logp": teacher_logp}
            data = {name: x.detach().float() for name, x in stream.items()}
            data |= {"advantages": torch.zeros(len(logp)), "loss_mask": loss_mask.float(), "cu_seqlens": cu_seqlens}
            data |= {"rl_loss_weight": 1.0, "distill_loss_weight": 1.0}
            return function(logp.float(), torch.zeros(len(logp)), data, **CLIPS)

        gradient = expected_gradient(loss, tree, under=under)
        stats_tracker.export()
        return gradient

    for under in ("student", "behaviour"):
        reverse_kl = expected_gradient(kdloss.distillation_loss, tree, normalizer=2, under=under)
        torch.testing.assert_close(expected(areal.grpo_loss_fn, under), reverse_kl, rtol=0, atol=1e-6)
    assert expected(THEIRS, "student").abs().max() < 1e-6
    assert reverse_kl.abs().max() > 0.01


@pytest.mark.parametrize(
    ("file", "lines"),
    [
        # a worker has a RANK before it imports the class of its engine, by the name that the class gives itself
        ("infra/controller/train_controller.py", ['"RANK": str(rank)', "set_worker_env", "create_engine("]),
        ("infra/controller/train_controller.py", ["{engine_class.__module__}.{engine_class.__name__}"]),
        ("experimental/training_service/controller/controller.py", ['"RANK": str(rank)', "/set_env"]),
        # the controller looks the class up when it makes its trainer, and never makes an object of it
        ("trainer/rl_trainer.py", ["from areal.engine import FSDPPPOActor", "actor_cls.as_controller("]),
        ("engine/fsdp_engine.py", ["class FSDPPPOActor(", "def __init__(self, config: PPOActorConfig):"]),
        ("utils/environ.py", ["def is_single_controller", 'not get_bool_env_var("AREAL_SPMD_MODE")']),
    ],
)
def test_areal_starts_its_workers_as_the_page_says(file: str, lines: list[str]) -> None:
    """By its source: its controller and its engines need packages that are not installed here."""
    (package,) = importlib.import_module("areal").__path__
    source = (Path(package) / file).read_text("utf-8")
    positions = [source.find(line) for line in lines]
    assert -1 not in positions, lines
    assert positions == sorted(positions)


def test_the_actor_trains_with_what_is_installed(monkeypatch) -> None:
    """`PPOActor._ppo_update` itself, with an engine that descends the loss that the actor passes."""
    monkeypatch.setattr(actor, "grpo_loss_fn", THEIRS)
    areal.install(kd_reward_clip=5.0)
    assert actor.grpo_loss_fn is not THEIRS
    config = actor.PPOActorConfig(experiment_name="e", trial_name="t", backend="fsdp:d1", ppo_n_minibatches=2)
    losses: list[Tensor] = []

    class Engine:
        def train(self) -> None: ...

        def get_version(self) -> int:
            return 4

        def train_batch(self, data: dict[str, Any], loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
            packed = pack_tensor_dict(data)
            logp = student(packed).requires_grad_()
            loss = loss_fn(logp, -logp.detach(), packed, vocab_min_logits=-logp.exp(), vocab_max_logits=logp.exp())
            loss.backward()
            assert logp.grad[packed["loss_mask"].bool()].ne(0).any()
            assert float(loss_weight_fn(packed)) == float(packed["loss_mask"].sum())
            losses.append(loss.detach())
            return {"grad_norm": float(logp.grad.norm())}

    rows = trajectories()
    for row in rows:
        row |= {"rl_loss_weight": 1.0, "distill_loss_weight": 0.5}
    data, _ = concat_batch(rows)
    shape = data["loss_mask"].shape
    data |= {
        "rewards": torch.tensor([1.0, 0, 1, 0, 0, 1]),
        "tot_rewards": torch.zeros(shape),
        "kl_rewards": torch.zeros(shape),
    }
    actor.PPOActor(config, Engine())._ppo_update(data)
    assert len(losses) == 2
    stats = stats_tracker.export()
    assert {"update/rkl_loss/avg", "update/actor_loss/avg", "update/importance_weight/max"} <= stats.keys()


def test_another_version_with_all_hooks_is_used_with_a_warning(monkeypatch) -> None:
    """What the adapter looks for in a version that it was not tested with is what the tested one has."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "99.0")
    monkeypatch.setattr(actor, "grpo_loss_fn", THEIRS)
    areal._areal.cache_clear()
    with pytest.warns(UserWarning, match=r"was tested with areal>=1\.0\.4,<1\.1, and 99\.0 is installed"):
        areal.install()
    assert actor.grpo_loss_fn.func is areal.grpo_loss_fn
    areal._areal.cache_clear()
    monkeypatch.setattr(actor, "grpo_loss_fn", lambda logprobs, entropy, batch: None)
    with pytest.raises(
        ImportError, match=r"needs grpo_loss_fn\(logprobs, entropy, input_data, .*the key 'teacher_logp' of"
    ):
        areal.install()
