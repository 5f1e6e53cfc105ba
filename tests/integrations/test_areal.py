"""Tests the AReaL adapter against AReaL 1.0.4: its batches, 42 cases computed by its own loss, its statistics.

AReaL itself is not installed here (tests/trainers/areal has it). A stand-in enforces the rules of its tracker.
Tolerances: rtol 1e-12 in float64; 2e-6 in float32, about 16 roundings.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss.integrations import areal

DATA = Path(__file__).parents[1] / "data"
SMALL = json.loads((DATA / "areal-1.0.4.json").read_text())
PACKED = json.loads((DATA / "areal-1.0.4-packed.json").read_text())
CLIPS = {"eps_clip": 0.2, "eps_clip_higher": 0.28, "c_clip": None}


class Tracker:
    """AReaL's rules: denominators are bool; statistics are float32, with the shape of a denominator recorded before."""

    def __init__(self) -> None:
        self.denominators: dict[str, Tensor] = {}
        self.stats: dict[str, tuple[Tensor, str]] = {}
        self.scalars: dict[str, float] = {}

    def denominator(self, **masks: Tensor) -> None:
        for name, mask in masks.items():
            assert mask.dtype == torch.bool, name
            self.denominators[name] = mask

    def stat(self, *, denominator: str, **values: Tensor) -> None:
        for name, x in values.items():
            assert x.dtype == torch.float32, name
            assert not x.requires_grad, name
            assert x.shape == self.denominators[denominator].shape, name
            self.stats[name] = (x, denominator)

    def scalar(self, **values: float) -> None:
        self.scalars |= {name: float(x) for name, x in values.items()}


@pytest.fixture(autouse=True)
def trainer(monkeypatch) -> SimpleNamespace:
    """The part of `areal.trainer.ppo.actor` that the adapter uses."""
    module = SimpleNamespace(stats_tracker=Tracker(), logged={})
    module.infer_token_denominator = lambda data, like: torch.ones_like(like, dtype=torch.bool)

    def approximate(*, old_logp: Tensor, logprobs: Tensor, versions: Tensor, current_version: int, method: str) -> dict:
        # the proximal policy is the sampling policy where that is one version behind, else halfway between
        return {method: torch.where(versions >= current_version - 1, old_logp, (old_logp + logprobs) / 2)}

    module.compute_prox_logp_approximations = approximate
    module._log_proximal_approximation_stats = module.logged.update
    module._log_version_staleness_stats = module.logged.update
    monkeypatch.setattr(areal, "_areal", lambda: module)
    return module


def rollout(lengths=(5, 7, 4), prompts=(2, 3, 1), *, seed: int = 0, dtype=torch.float64) -> dict[str, Any]:
    """A padded batch as in the actor after `compute_advantages`: rolled by one from own positions, float loss_mask."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = len(lengths), max(lengths)
    position = torch.arange(length)
    valid = position < torch.tensor(lengths)[:, None]
    own_mask = valid & (position >= torch.tensor(prompts)[:, None])

    def logp() -> Tensor:
        return -torch.rand(rows, length, generator=generator, dtype=dtype) * 2 - 0.05

    loss_mask = torch.roll(own_mask.float(), -1, -1)
    return {
        "attention_mask": valid.long(),
        "loss_mask": loss_mask,
        "logprobs": torch.roll(torch.where(own_mask, logp(), 0), -1, -1) * loss_mask,
        "prox_logp": logp(),
        "advantages": torch.randn(rows, length, generator=generator, dtype=dtype),
        "teacher_logp": logp(),
        "rl_loss_weight": 1.0,
        "distill_loss_weight": 0.3,
        "versions": torch.where(own_mask, torch.randint(3, (rows, length), generator=generator), -1),
    }


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """Like `pack_tensor_dict`: packs tensors with the shape of the attention mask and leaves the rest."""
    lengths = batch["attention_mask"].sum(1)
    total = int(lengths.sum())
    packed = {
        k: kdloss.pack(x, lengths=lengths, total_tokens=total) if torch.is_tensor(x) else x for k, x in batch.items()
    }
    del packed["attention_mask"]
    return packed | {"cu_seqlens": kdloss.cu_seqlens_from_lengths(lengths.int())}


def student(batch: dict[str, Any], *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch["logprobs"].shape, generator=generator, dtype=batch["logprobs"].dtype)
    return (batch["prox_logp"] + 0.3 * noise).requires_grad_()


def run(batch: dict[str, Any], logp: Tensor, **options: Any) -> Tensor:
    options = {"current_version": 3, **CLIPS, **options}
    (gradient,) = torch.autograd.grad(loss := areal.grpo_loss_fn(logp, -logp.detach(), batch, **options), logp)
    assert loss.ndim == 0
    return torch.cat([loss.detach().flatten(), gradient.flatten()])


def reference(batch: dict[str, Any], logp: Tensor, **options: Any) -> Tensor:
    clips = {"clip_low": 0.2, "clip_high": 0.28, "prox_logp": batch["prox_logp"]}
    out = kdloss.kdrl_loss(
        logp,
        batch["logprobs"],
        batch["teacher_logp"],
        batch["advantages"],
        loss_mask=batch["loss_mask"].bool(),
        **{"rl_loss_weight": 1.0, "distill_loss_weight": 0.3, **clips, **options},
    )
    (gradient,) = torch.autograd.grad(out.loss, logp)
    return torch.cat([out.loss.detach().flatten(), gradient.flatten()])


def check_golden(case: dict[str, Any], logp: Tensor, batch: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # direct_penalty warns; here it is intended
        loss = areal.grpo_loss_fn(logp, torch.zeros_like(logp), batch, **case["kw"], direct_penalty=True)
    (gradient,) = torch.autograd.grad(loss, logp)
    rtol = 1e-12 if logp.dtype == torch.float64 else 2e-6
    expected = torch.tensor(case["grad"], dtype=logp.dtype)
    torch.testing.assert_close(loss.detach(), torch.tensor(case["loss"], dtype=logp.dtype), rtol=rtol, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c['mode']}-{'packed' if c['packed'] else 'padded'}-{c['dtype']}") for c in SMALL]
)
def test_the_small_cases_of_areals_own_function(case: dict[str, Any]) -> None:
    dtype = getattr(torch, case["dtype"].removeprefix("torch."))
    batch = {k: torch.tensor(x, dtype=dtype) if isinstance(x, list) else x for k, x in case["inputs"].items()}
    if "cu_seqlens" in batch:
        batch["cu_seqlens"] = batch["cu_seqlens"].int()
    if case["mode"] == "grpo":
        batch.pop("teacher_logp", None)
    check_golden(case, torch.tensor(case["logprobs"], dtype=dtype, requires_grad=True), batch)


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c['tag']}-{sum(c['lens'])}") for c in PACKED])
def test_the_packed_cases_of_areals_own_function(case: dict[str, Any]) -> None:
    names = {
        "logprobs": "old_logp",
        "prox_logp": "prox_logp",
        "teacher_logp": "teacher_logp",
        "advantages": "advantages",
    }
    batch: dict[str, Any] = {k: torch.tensor(case[x], dtype=torch.float64) for k, x in names.items()}
    batch["loss_mask"] = torch.tensor(case["loss_mask"]).float()
    batch["cu_seqlens"] = kdloss.cu_seqlens_from_lengths(torch.tensor(case["lens"], dtype=torch.int32))
    if case["mode"] in ("kd", "joint"):
        batch |= {"rl_loss_weight": case["rl_loss_weight"], "distill_loss_weight": case["distill_loss_weight"]}
    else:
        del batch["teacher_logp"]
    if case["kw"].get("use_sapo_loss"):
        batch["logprobs"] = batch["prox_logp"]  # as in the actor: SAPO is never decoupled
    check_golden(case, torch.tensor(case["logp"], dtype=torch.float64, requires_grad=True), batch)


@pytest.mark.parametrize("options", [{}, {"kd_reward_clip": 0.4}, {"kd_max_ratio": 1.1}], ids=str)
@pytest.mark.parametrize("rl_loss_weight", [0.0, 0.7, 1.0])
def test_the_distillation_term_is_the_right_one(rl_loss_weight: float, options: dict[str, float]) -> None:
    batch = pack(rollout()) | {"rl_loss_weight": rl_loss_weight}
    logp = student(batch)
    torch.testing.assert_close(
        run(batch, logp, **options), reference(batch, logp, rl_loss_weight=rl_loss_weight, **options)
    )


def test_the_literal_one_has_no_teacher_in_its_gradient_and_says_so() -> None:
    batch = pack(rollout())
    logp = student(batch)
    with pytest.warns(UserWarning, match="descends logp - teacher_logp itself"):
        literal = run(batch, logp, direct_penalty=True)
    with pytest.warns(UserWarning, match="the teacher is not in its gradient"):
        other = run(batch | {"teacher_logp": batch["teacher_logp"] - 1}, logp, direct_penalty=True)
    torch.testing.assert_close(literal[1:], other[1:])
    assert (run(batch, logp) - literal)[1:].abs().max() > 1e-2
    # without RL, AReaL descends the surrogate, and so does the literal form
    batch["rl_loss_weight"] = 0.0
    torch.testing.assert_close(run(batch, logp, direct_penalty=True), run(batch, logp))


MODES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dual clip": {"c_clip": 1.3},
    "gspo": {"importance_sampling_level": "sequence"},
    "gspo, dual clip": {"importance_sampling_level": "sequence", "c_clip": 1.02},
    "sapo": {"use_sapo_loss": True},
    "sapo by sequence": {"use_sapo_loss": True, "importance_sampling_level": "sequence"},
    "cispo": {"use_cispo_loss": True},
    "m2po": {"m2_threshold": 0.3},
    "discount": {"kd_discount": 0.5},
} | {
    f"{level} {action} {metric} {agg}": {
        "rejection_sampling": SimpleNamespace(
            level=level, action=action, metric=metric, agg=agg, upper=upper, lower=lower
        )
    }
    for level, action, metric, agg, upper, lower in [
        ("token", "mask", "ratio", "mean", 1.4, 0.5),
        ("token", "clamp", "ratio", "mean", 1.4, 0.5),
        ("token", "mask", "kl_k3", "mean", 0.1, None),
        ("sequence", "mask", "ratio", "mean", 1.1, None),
        ("sequence", "clamp", "ratio", "sum", 1.2, 0.8),
        ("sequence", "mask", "kl_k2", "max", 0.9, None),
    ]
}


@pytest.mark.parametrize("mode", MODES)
def test_padded_is_packed(mode: str, trainer: SimpleNamespace) -> None:
    padded = rollout()
    padded["prox_logp"] = padded["prox_logp"] * 0.3 + padded["logprobs"] * 0.7
    logp = student(padded)
    valid = padded["attention_mask"].bool()
    outside = run(padded, logp, **MODES[mode])
    padded_stats = trainer.stats_tracker.stats
    trainer.stats_tracker = Tracker()
    packed_logp = logp.detach()[valid].requires_grad_()
    inside = run(pack(padded), packed_logp, **MODES[mode])
    torch.testing.assert_close(outside[:1], inside[:1])
    torch.testing.assert_close(outside[1:].view_as(logp)[valid], inside[1:])
    assert outside[1:].view_as(logp)[~valid].abs().max() == 0
    trained = padded["loss_mask"].bool()
    assert padded_stats.keys() == trainer.stats_tracker.stats.keys()
    for name, (x, _) in trainer.stats_tracker.stats.items():
        torch.testing.assert_close(x[trained[valid]], padded_stats[name][0][trained], msg=name)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "m2po"])  # M2PO ranks the tokens of a micro-batch
def test_micro_batches_sum_to_the_batch(mode: str) -> None:
    """The engine weights each micro-batch by its trained tokens; masks that drop some must not change that number."""
    batch = rollout()
    batch["prox_logp"] = batch["prox_logp"] * 0.3 + batch["logprobs"] * 0.7
    logp = student(batch)
    weight = batch["loss_mask"].sum(1)
    parts = []
    for row in range(3):
        one = {k: x[row : row + 1] if torch.is_tensor(x) else x for k, x in batch.items()}
        part = run(one, logp[row : row + 1].detach().requires_grad_(), **MODES[mode])
        parts.append(part * weight[row] / weight.sum())
    whole = run(batch, logp, **MODES[mode])
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(torch.cat([p[1:] for p in parts]), whole[1:])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_trained_leaves_no_trace(mode: str) -> None:
    batch = pack(rollout())
    logp = student(batch)
    clean = run(batch, logp, **MODES[mode])
    untrained = ~batch["loss_mask"].bool()
    for name in ("logprobs", "prox_logp", "advantages"):
        batch[name] = torch.where(untrained, torch.nan, batch[name])
    # AReaL's engines keep log-probs finite at prompts; a teacher's may be -inf there
    batch["teacher_logp"] = torch.where(untrained, -torch.inf, batch["teacher_logp"])
    torch.testing.assert_close(run(batch, logp, **MODES[mode]), clean)


def test_a_teacher_needs_a_weight_and_a_batch_without_a_teacher_needs_none() -> None:
    batch = pack(rollout())
    logp = student(batch)
    silent = run(batch | {"distill_loss_weight": 0.0}, logp)
    for missing in (lambda: batch.pop("distill_loss_weight"), lambda: batch.update(distill_loss_weight=None)):
        missing()
        with pytest.raises(ValueError, match=r"hold distill_loss_weight beside teacher_logp.*docs/weights.md"):
            run(batch, logp)
    del batch["teacher_logp"], batch["distill_loss_weight"]
    torch.testing.assert_close(run(batch, logp), silent)


def test_gspo_is_the_librarys_gspo() -> None:
    batch = pack(rollout())
    del batch["teacher_logp"]
    batch["advantages"] = torch.where(batch["loss_mask"].bool(), 1.0, torch.nan).double()
    logp = student(batch)
    surrogate = kdloss.sequence_clipped_surrogate(
        logp,
        batch["prox_logp"],
        torch.ones_like(logp),
        loss_mask=batch["loss_mask"].bool(),
        cu_seqlens=batch["cu_seqlens"],
        clip_low=0.2,
        clip_high=0.28,
    )
    loss = kdloss.token_mean(surrogate.loss, loss_mask=batch["loss_mask"].bool())
    (gradient,) = torch.autograd.grad(loss, logp)
    mine = run(batch, logp, importance_sampling_level="sequence")
    torch.testing.assert_close(mine, torch.cat([loss.detach().view(1), gradient]))


def test_m2po_drops_the_largest_until_the_mean_is_below_the_threshold() -> None:
    batch = pack(rollout())
    trained = batch["loss_mask"].bool()
    squared = (batch["prox_logp"] - batch["logprobs"]).square()
    for threshold in (1e-6, 0.05, 0.3, 10.0):
        kept = areal.m2po_mask(batch["prox_logp"], batch["logprobs"], trained, threshold)
        assert not (kept & ~trained).any()
        left = squared[kept]
        assert len(left) == 1 or left.mean() < threshold
        dropped = squared[trained & ~kept]
        if len(dropped):
            assert dropped.min() >= left.max()
            assert torch.cat([left, dropped.min().view(1)]).mean() >= threshold


def late(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The teacher's scores of a padded batch as a rollout engine writes them: at response tokens, 0 elsewhere."""
    own = torch.roll(batch["loss_mask"], 1, -1).bool()
    return torch.where(own, torch.roll(batch["teacher_logp"], 1, -1), 0)


def test_a_teacher_behind_a_rollout_engine_is_shifted() -> None:
    padded = rollout()
    logp = student(padded)
    right = run(padded, logp)
    torch.testing.assert_close(run(padded | {"teacher_logp": late(padded)}, logp, teacher_alignment="token"), right)
    for batch, x in (
        (padded | {"teacher_logp": late(padded)}, logp),
        (pack(padded | {"teacher_logp": late(padded)}), student(pack(padded))),
    ):
        with pytest.raises(ValueError, match=r"own positions and nowhere else.*teacher_alignment='token'"):
            run(batch, x)


@pytest.mark.parametrize("layout", [pack, dict])
def test_scores_that_are_in_place_are_not_shifted_again(layout: Any) -> None:
    """A teacher that is a train engine scores every position; one that AReaL has shifted scores the trained ones."""
    padded = rollout()
    for teacher_logp in (padded["teacher_logp"], padded["teacher_logp"] * padded["loss_mask"]):
        batch = layout(padded | {"teacher_logp": teacher_logp})
        logp = student(batch)
        with pytest.raises(ValueError, match=r"prediction positions already.*use teacher_alignment='prediction'"):
            run(batch, logp, teacher_alignment="token")
        torch.testing.assert_close(run(batch, logp), reference(batch, logp))


@pytest.mark.parametrize("layout", [pack, dict])
def test_a_late_teacher_that_is_certain_is_still_shifted(layout: Any) -> None:
    """Scores of exactly 0, at the last token and everywhere, say nothing about where the others are."""
    padded = rollout()
    mask = padded["loss_mask"].bool()
    for certain in (mask & ~torch.roll(mask, -1, -1), mask):
        teacher_logp = torch.where(certain, 0, padded["teacher_logp"])
        batch = layout(padded | {"teacher_logp": late(padded | {"teacher_logp": teacher_logp})})
        right = layout(padded | {"teacher_logp": teacher_logp})
        logp = student(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            shifted = run(batch, logp, teacher_alignment="token")
        torch.testing.assert_close(shifted, run(right, logp))
        assert [str(x.message)[:42] for x in caught] == ["cannot tell whether teacher_logp is late: "[:42]]


@pytest.mark.parametrize("layout", [pack, dict])
def test_late_scores_are_refused_beside_a_sequence_that_is_scored_and_not_trained(layout: Any) -> None:
    padded = rollout()
    batch = padded | {"teacher_logp": late(padded)}
    batch["loss_mask"] = padded["loss_mask"].clone()
    batch["loss_mask"][0] = 0
    given = layout(batch)
    with pytest.raises(ValueError, match="own positions and nowhere else"):
        run(given, student(given))


def test_a_teacher_that_is_certain_is_not_taken_for_a_late_one() -> None:
    """Log-probs of exactly 0, as for a forced first token, and a teacher that is 0 at every untrained position."""
    batch = pack(rollout())
    logp = student(batch)
    trained = batch["loss_mask"].bool()
    first = trained & ~trained.roll(1)
    certain = torch.where(first, 0, batch["teacher_logp"])
    for teacher_logp in (certain, certain * trained, torch.zeros_like(certain)):
        batch["teacher_logp"] = teacher_logp
        torch.testing.assert_close(run(batch, logp), reference(batch, logp))


def test_versions_are_read_at_the_token_that_they_belong_to(trainer: SimpleNamespace) -> None:
    padded = rollout()
    del padded["prox_logp"]
    own = torch.roll(padded["loss_mask"], 1, -1).bool()
    # one version behind at every response token: the proximal policy sampled it
    padded["versions"] = torch.where(own, 2, -1)
    logp = student(rollout())
    mine = run(padded, logp, prox_logp_method="loglinear")
    torch.testing.assert_close(mine, run(padded | {"prox_logp": padded["logprobs"]}, logp))
    versions = trainer.logged["versions"]
    assert (versions[padded["loss_mask"].bool()] == 2).all()
    with pytest.raises(ValueError, match="holds no prox_logp, and prox_logp_method='recompute' cannot replace it"):
        run(padded, logp)


def test_the_statistics_have_areals_names(trainer: SimpleNamespace) -> None:
    batch = pack(rollout())
    logp = student(batch)
    run(
        batch, logp, vocab_min_logits=torch.zeros(16), vocab_max_logits=torch.ones(16), **MODES["token mask ratio mean"]
    )
    tracker = trainer.stats_tracker
    assert tracker.denominators.keys() == {
        "n_tokens",
        "n_valid_tokens",
        "clipped_tokens",
        "dual_clipped_tokens",
        "unclipped_behave_tokens",
    }
    by_denominator: dict[str, set[str]] = {}
    for name, (_, denominator) in tracker.stats.items():
        by_denominator.setdefault(denominator, set()).add(name)
    assert by_denominator == {
        "n_valid_tokens": {
            "rkl_loss",
            "importance_weight",
            "approx_kl",
            "new_logp",
            "old_logp",
            "entropy",
            "actor_loss",
            "clip_ratio",
            "dual_clip_ratio",
        },
        "unclipped_behave_tokens": {"behave_imp_weight", "behave_approx_kl"},
        "n_tokens": {"vocab_min_logits", "vocab_max_logits"},
        "clipped_tokens": {"clipped_new_logp", "clipped_old_logp"},
    }
    assert tracker.scalars.keys() == {"rs_filtered_fraction"}
    assert 0 < tracker.scalars["rs_filtered_fraction"] < 1
    trained = batch["loss_mask"].bool()
    expected = (logp.detach() - batch["teacher_logp"]).float()
    torch.testing.assert_close(tracker.stats["rkl_loss"][0][trained], expected[trained])


def test_an_empty_micro_batch_keeps_the_graph() -> None:
    batch = pack(rollout())
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    assert (run(batch, student(batch)) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_sampling_level": "turn"}, "must be 'token' or 'sequence', got 'turn'"),
        ({"use_sapo_loss": True, "use_cispo_loss": True}, "exclude each other"),
        ({"use_sapo_loss": True, "use_decoupled_loss": True}, "unset use_decoupled_loss"),
        ({"use_sapo_loss": True, **MODES["token mask ratio mean"]}, "use_cispo_loss=True, which takes both"),
        ({"use_cispo_loss": True, "importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
        ({"use_cispo_loss": True, "c_clip": 3.0}, "set c_clip to None"),
        ({"teacher_alignment": "own"}, "must be 'prediction' or 'token', got 'own'"),
        ({"direct_penalty": True, "kd_discount": 0.5}, "kd_discount must be 0 with direct_penalty=True"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    batch = pack(rollout())
    with pytest.raises(ValueError, match=message):
        run(batch, student(batch), **options)


@pytest.mark.parametrize("mode", ["gspo", "sequence mask ratio mean", "discount"])
def test_a_slice_of_a_sequence_gives_no_sequence_level(mode: str) -> None:
    batch = pack(rollout())
    logp = student(batch)
    part = {k: x[:7] if torch.is_tensor(x) and k != "cu_seqlens" else x for k, x in batch.items()}
    piece = logp.detach()[:7].requires_grad_()
    assert run(part, piece).isfinite().all()
    with pytest.raises(ValueError, match=r'number of tokens 7, got 16.*importance_sampling_level="token"'):
        run(part, piece, **MODES[mode])
    del batch["cu_seqlens"]
    with pytest.raises(ValueError, match="must hold cu_seqlens"):
        run(batch, logp, **MODES[mode])


def test_install_replaces_the_function_with_its_options(trainer: SimpleNamespace) -> None:
    areal.install(kd_reward_clip=0.4)
    batch = pack(rollout())
    logp = student(batch)
    loss = trainer.grpo_loss_fn(logp, logp.detach(), batch, **CLIPS)
    torch.testing.assert_close(loss.detach(), reference(batch, logp, kd_reward_clip=0.4)[0])
    with pytest.raises(TypeError, match=r"options must be among use_cispo_loss, .*got 'eps_clip'"):
        areal.install(eps_clip=0.1)


@pytest.mark.parametrize(
    ("process", "trains"),
    [({}, False), ({"AREAL_SPMD_MODE": "0"}, False), ({"AREAL_SPMD_MODE": "True"}, True), ({"RANK": "3"}, True)],
    ids=["controller", "controller by name", "launcher", "worker"],
)
def test_install_in_the_controller_logs_a_warning(monkeypatch, caplog, process: dict[str, str], trains: bool) -> None:
    for name in ("RANK", "AREAL_SPMD_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in process.items():
        monkeypatch.setenv(name, value)
    areal.install()
    said = [(record.levelname, "AReaL's own loss stays in use" in record.message) for record in caplog.records]
    assert said == ([] if trains else [("WARNING", True)])


def test_without_areal_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.undo()
    areal._areal.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'areal>=1\.0\.4,<1\.1'"):
        areal.install()


@pytest.mark.parametrize("layout", [pack, dict])
def test_a_rollout_teacher_of_several_turns_is_refused(layout: Any) -> None:
    batch = rollout()
    batch["teacher_logp"] = late(batch)
    run(layout(batch), student(layout(batch)), teacher_alignment="token")
    batch["loss_mask"][1, 3] = 0  # between two turns
    with pytest.raises(ValueError, match=r"one run up to its end.*several turns are wrong"):
        run(layout(batch), student(layout(batch)), teacher_alignment="token")
