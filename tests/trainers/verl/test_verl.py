"""Tests the adapter inside verl: its plug-in loader finds it, and it equals verl's own losses where those are right.

Tolerances: rtol 1e-9 in float64, because verl's means add 1e-8 to their denominators; expected gradients 1e-10.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import verl  # loads the plug-in
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import distillation_ppo_loss, get_distillation_loss_fn
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.workers.config import (
    ActorConfig,
    DistillationConfig,
    DistillationLossConfig,
    DistillationTeacherModelConfig,
    RolloutConfig,
)
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

import kdloss
from kdloss import _checks
from kdloss.integrations import verl as adapter
from kdloss.testing import SequenceTree, expected_gradient
from launches import Launches

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
STEPS = {
    "micro-batch": {},
    "step": {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 16, "loss_scale_factor": 9},
}
PAIRS = {"vanilla": "kdloss_ppo", "gspo": "kdloss_gspo", "sapo": "kdloss_sapo", "cispo": "kdloss_cispo"}


def actor_config(**fields: Any) -> ActorConfig:
    sizes = {"ppo_micro_batch_size_per_gpu": 1, "rollout_n": 1}
    return ActorConfig(strategy="fsdp", **{**sizes, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, **fields})


def test_the_plugin_was_found() -> None:
    assert verl.__version__ == "0.9.1"
    for name, function in adapter.POLICY_LOSSES.items():
        assert get_policy_loss_fn(name) is function
    assert get_distillation_loss_fn("kdloss_reverse_kl") is adapter.reverse_kl
    adapter.register()  # again, by hand: no error


def test_the_pages_first_lines_make_a_teacher() -> None:
    """With the page's options over the defaults of verl's YAML; verl reads them in this way, with hydra."""
    page = (Path(__file__).parents[3] / "docs" / "integrations" / "verl.md").read_text("utf-8")
    lines = re.findall(r"^[ +] +(distillation\.\S+)", page.split("```diff\n")[1].split("```")[0], re.MULTILINE)
    defaults = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")

    def teachers(options: list[str]) -> list[tuple[str | None, int]]:
        made = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.from_dotlist(options)), resolve=True)
        config = made["distillation"]
        fields = config["teacher_models"]["teacher_model"]
        teacher = DistillationTeacherModelConfig(
            model_path=fields["model_path"],
            inference=RolloutConfig(
                name="vllm", tensor_model_parallel_size=fields["inference"]["tensor_model_parallel_size"]
            ),
        )
        loss = {name: x for name, x in config["distillation_loss"].items() if name != "_target_"}
        found = DistillationConfig(
            enabled=config["enabled"],
            nnodes=config["nnodes"],
            n_gpus_per_node=config["n_gpus_per_node"],
            teacher_models={"teacher_model": teacher},
            distillation_loss=DistillationLossConfig(**loss),
        )
        assert found.distillation_loss.loss_mode == "kdloss_reverse_kl"
        return [(x.model_path, x.num_replicas) for x in found.teacher_models.values()]

    assert teachers(lines) == [("Qwen/Qwen3-8B", 4)]
    without_nodes = [x for x in lines if ".nnodes=" not in x]
    assert teachers(without_nodes) == [("Qwen/Qwen3-8B", 0)]


def test_another_version_with_all_hooks_is_used_with_a_warning(monkeypatch) -> None:
    """What the adapter looks for in a version that it was not tested with is what the tested one has."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "99.0")
    adapter._require.cache_clear()
    with pytest.warns(UserWarning, match=r"was tested with verl>=0\.9\.1,<0\.10, and 99\.0 is installed"):
        adapter.register()
    for module in adapter._HOOKS:
        assert adapter._require(module=module).__name__ == module
    adapter._require.cache_clear()
    monkeypatch.delattr("verl.trainer.distillation.losses.get_distillation_loss_fn")
    lacks = r"needs get_distillation_loss_fn in verl\.trainer\.distillation\.losses, which verl 99\.0 does not have"
    with pytest.raises(ImportError, match=lacks):
        adapter.register()
    adapter._require.cache_clear()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("step", STEPS)
# verl's own sapo always reduces by seq-mean-token-mean
@pytest.mark.parametrize(
    ("name", "mode"), [(name, m) for name in PAIRS for m in (MODES if name != "sapo" else ("seq-mean-token-mean",))]
)
def test_policy_losses_are_verls_own(name: str, mode: str, step: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(5, 7, generator=generator, dtype=torch.float64)

    spread = 0.03 if name == "gspo" else 0.4
    old = -normal().abs() - 0.1
    log_prob = (old + spread * normal()).requires_grad_()
    fields = {"clip_ratio_low": 0.01, "clip_ratio_high": 0.01} if name == "gspo" else {"clip_ratio_c": 1.4}
    arguments = {
        "old_log_prob": old,
        "log_prob": log_prob,
        "advantages": normal(),
        "response_mask": torch.arange(7) < torch.tensor([7, 3, 0, 5, 1])[:, None],
        "loss_agg_mode": mode,
        "config": actor_config(tau_pos=0.8, tau_neg=1.3, **fields),
        "rollout_is_weights": normal().exp() if weighted else None,
    }
    arguments["config"].global_batch_info.update(STEPS[step])
    theirs, their_metrics = get_policy_loss_fn(name)(**arguments)
    mine, my_metrics = get_policy_loss_fn(PAIRS[name])(**arguments)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(x, log_prob)[0] for x in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)
    assert gradients[0].abs().max() > 0
    assert my_metrics == pytest.approx(their_metrics, rel=1e-6)


def micro_batch(*, dtype: torch.dtype = torch.float64) -> tuple[TensorDict, dict[str, Tensor]]:
    """As in verl's worker: prompts left-padded, responses right-padded, then without padding."""
    generator = torch.Generator().manual_seed(3)
    prompts, responses = torch.tensor([2, 3, 1]), torch.tensor([4, 2, 5])
    prompt_mask = torch.arange(3) >= 3 - prompts[:, None]
    response_mask = torch.arange(5) < responses[:, None]
    attention_mask = torch.cat([prompt_mask, response_mask], 1).long()
    trained = response_mask.clone()
    trained[0, 1] = False  # a tool's output

    def logp(*shape: int) -> Tensor:
        return -torch.rand(*shape, generator=generator, dtype=dtype) * 3

    data = TensorDict(
        {
            "prompts": torch.zeros(3, 3, dtype=torch.long),
            "responses": torch.zeros(3, 5, dtype=torch.long),
            "input_ids": torch.zeros(3, 8, dtype=torch.long),
            "attention_mask": attention_mask,
            "position_ids": attention_mask.cumsum(1) - 1,
            "response_mask": trained.long(),
            "old_log_probs": logp(3, 5),
            "advantages": torch.randn(3, 5, generator=generator, dtype=dtype),
            "teacher_logprobs": logp(3, 8, 1),
            "teacher_ids": torch.zeros(3, 8, 1, dtype=torch.long),
        },
        batch_size=3,
    )
    data = left_right_2_no_padding(data)
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=10, global_batch_size=3)
    total = int(attention_mask.sum())
    values = logp(total).requires_grad_()
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), attention_mask.sum(1).cumsum(0)])
    return data, {"values": values, "log_probs": torch.nested.nested_tensor_from_jagged(values, offsets)}


def distillation_config(**fields: Any) -> DistillationConfig:
    return DistillationConfig(distillation_loss=DistillationLossConfig(**{"loss_max_clamp": None, **fields}))


def run(fields: dict[str, Any], **actor: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    data, output = micro_batch()
    loss, metrics = distillation_ppo_loss(actor_config(**actor), distillation_config(**fields), output, data)
    (gradient,) = torch.autograd.grad(loss, output["values"])
    return loss.detach(), gradient, metrics


def expected(clip: float | None = None) -> Tensor:
    """The gradient of `distillation_loss` on the responses that verl extracts, computed by hand."""
    data, output = micro_batch()
    index = torch.tensor([[1, 2, 3, 4, 0], [8, 9, 0, 0, 0], [11, 12, 13, 14, 15]])
    logp = output["values"][index]
    teacher = data["teacher_logprobs"].values().squeeze(-1)[index]
    mask = data["response_mask"].bool()
    loss = kdloss.distillation_loss(
        logp, data["old_log_probs"], teacher, loss_mask=mask, kd_reward_clip=clip, normalizer=10
    ).loss
    return torch.autograd.grad(loss, output["values"])[0]


@pytest.mark.parametrize("clip", [None, 0.6])
def test_verl_descends_the_right_gradient(clip: float | None) -> None:
    fields = {"use_policy_gradient": False, "use_task_rewards": False, "loss_max_clamp": clip}
    _, gradient, metrics = run({"loss_mode": "kdloss_reverse_kl", **fields})
    torch.testing.assert_close(gradient, expected(clip))
    assert {"distillation/loss", "distillation/loss_min", "distillation/abs_loss"} <= metrics.keys()
    # verl's own estimators lose the gradient of a clamped token, and k1 is refused here
    with pytest.raises(ValueError, match="k1"):
        run({"loss_mode": "k1", **fields})
    if clip is not None:
        _, k2, _ = run({"loss_mode": "k2", **fields})
        assert (k2 == 0).sum() > (gradient == 0).sum()


def test_a_rollout_at_another_temperature_is_refused() -> None:
    """verl's engines read the temperature from the batch, where the trainer stores it next to the tensors."""
    data, output = micro_batch()
    fields = {"loss_mode": "kdloss_reverse_kl", "use_policy_gradient": False, "use_task_rewards": False}
    for temperature in (1.0, 0.7):
        tensordict_utils.assign_non_tensor(data, temperature=temperature)
        if temperature == 1:
            distillation_ppo_loss(actor_config(), distillation_config(**fields), output, data)
            continue
        with pytest.raises(ValueError, match="temperature must be 1"):
            distillation_ppo_loss(actor_config(), distillation_config(**fields), output, data)


def test_as_an_advantage_it_is_verls_k1() -> None:
    fields = {"use_policy_gradient": True, "use_task_rewards": False}
    mine, theirs = (run({"loss_mode": name, **fields}) for name in ("kdloss_reverse_kl", "k1"))
    torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(mine[1], theirs[1])
    assert mine[2].keys() == theirs[2].keys()


def test_joined_with_rl_the_terms_add() -> None:
    """`use_task_rewards` and its coefficient are the joint mode: PPO's loss plus coefficient * distillation loss."""
    joint = {"use_policy_gradient": False, "use_task_rewards": True, "distillation_loss_coef": 0.3}
    _, gradient, _ = run({"loss_mode": "kdloss_reverse_kl", **joint}, policy_loss={"loss_mode": "kdloss_ppo"})
    data, output = micro_batch()
    rl, _ = ppo_loss(actor_config(policy_loss={"loss_mode": "vanilla"}), output, data)
    (of_rl,) = torch.autograd.grad(rl, output["values"])
    torch.testing.assert_close(gradient, of_rl + 0.3 * expected(), rtol=1e-7, atol=1e-12)


def verl_expected_gradient(mode: str, *, use_policy_gradient: bool, under: str) -> Tensor:
    """The expected gradient of verl's own `distillation_ppo_loss` at the root, over every outcome."""

    def loss(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        if len(cu_seqlens) > 2:
            return logp.sum()  # never descended: this call only checks whether the loss is per token
        length = len(logp)
        last = torch.zeros(1, dtype=logp.dtype)  # the last token predicts nothing
        data = TensorDict(
            {
                "prompts": torch.zeros(1, 1, dtype=torch.long),
                "responses": torch.zeros(1, length, dtype=torch.long),
                "attention_mask": torch.ones(1, length + 1, dtype=torch.long),
                "response_mask": loss_mask[None].long(),
                "old_log_probs": old_logp.detach()[None],
                "teacher_logprobs": torch.cat([teacher_logp, last])[:, None][None],
            },
            batch_size=1,
        )
        data["teacher_logprobs"] = torch.nested.as_nested_tensor([data["teacher_logprobs"][0]], layout=torch.jagged)
        tensordict_utils.assign_non_tensor(
            data, dp_size=1, batch_num_tokens=1, global_batch_size=1, max_response_len=length
        )
        fields = {"use_policy_gradient": use_policy_gradient, "use_task_rewards": False, "loss_mode": mode}
        wide = {"clip_ratio": 1e6, "clip_ratio_low": 1.0, "clip_ratio_high": 1e6}
        output = {"log_probs": torch.cat([logp, last])}
        if use_policy_gradient:
            data["advantages"] = torch.zeros_like(data["old_log_probs"])
            output["log_probs"] = torch.nested.as_nested_tensor([output["log_probs"]], layout=torch.jagged)
        return distillation_ppo_loss(actor_config(), distillation_config(**fields, **wide), output, data)[0]

    return expected_gradient(loss, tree, under=under)[0]


tree = SequenceTree(vocab_size=3, max_length=1)


def test_what_each_of_verls_estimators_descends() -> None:
    """The trap: k3, verl's default, is the forward KL when descended, and reverse minus forward KL as an advantage."""
    q, p = (torch.log_softmax(x[0], -1).exp().detach() for x in (tree.student, tree.teacher))
    forward = q - p
    log_ratio = (q / p).log()
    reverse = q * (log_ratio - (q * log_ratio).sum())

    def of(mode: str, *, use_policy_gradient: bool, under: str = "student") -> Tensor:
        return verl_expected_gradient(mode, use_policy_gradient=use_policy_gradient, under=under)

    def close(x: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)

    close(of("k3", use_policy_gradient=False), forward)
    close(of("k3", use_policy_gradient=True), reverse - forward)
    close(of("k2", use_policy_gradient=False), reverse)
    assert (of("k2", use_policy_gradient=False, under="behaviour") - reverse).abs().max() > 1e-3
    close(of("k1", use_policy_gradient=True), reverse)
    for under in ("student", "behaviour"):
        for use_policy_gradient in (False, True):
            close(of("kdloss_reverse_kl", use_policy_gradient=use_policy_gradient, under=under), reverse)


def test_launches_beside_verls_policy_loss(monkeypatch) -> None:
    """Forward and backward, as on a GPU. verl's loss reads three metrics, which waits for the device three times."""
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    old, advantages = -torch.rand(4, 64) - 0.1, torch.randn(4, 64)
    mask = torch.arange(64) < torch.tensor([64, 30, 1, 50])[:, None]

    def ppo(name: str) -> Callable[[Tensor], Tensor]:
        options = {"loss_agg_mode": "token-mean", "config": actor_config(clip_ratio_c=3.0)}
        return lambda logp: get_policy_loss_fn(name)(old, logp, advantages, mask, **options)[0]

    def grpo(logp: Tensor) -> Tensor:
        return kdloss.grpo_loss(logp, old, advantages, loss_mask=mask, clip_high=0.28, dual_clip=3.0).loss

    def with_statistics(logp: Tensor) -> Tensor:
        kdloss.diagnostics(logp, old, loss_mask=mask)
        return grpo(logp)

    losses = {"verl": ppo("vanilla"), "adapter": ppo("kdloss_ppo"), "grpo": grpo, "statistics": with_statistics}
    counted = {}
    for name, loss in losses.items():
        logp = (old + 0.1).requires_grad_()
        with Launches() as counted[name]:
            loss(logp).backward()
    print({name: (launches.total, launches.syncs.total()) for name, launches in counted.items()})
    assert counted["verl"].syncs.total() == 3
    assert {counted[name].syncs.total() for name in ("adapter", "grpo", "statistics")} == {0}
    assert counted["adapter"].total <= 61 < counted["verl"].total
    assert counted["grpo"].total <= 33 < counted["verl"].total
    assert counted["statistics"].total <= 62 < counted["verl"].total
