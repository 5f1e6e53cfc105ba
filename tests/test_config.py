"""Holds `KDRLConfig`: the `teacher:` block unchanged, helpful errors, and keywords for `kdrl_loss`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import types

import pytest
import torch

from kdloss import KDRLConfig, kdrl_loss

# The block in AReaL's documentation of on-policy distillation, as YAML parses it. `${...}` are interpolations of
# OmegaConf, which may or may not be resolved when the block is read.
BLOCK = {
    "backend": "fsdp:d1p1t4",
    "rl_loss_weight": 1.0,
    "distill_loss_weight": 0.005,
    "experiment_name": "${experiment_name}",
    "trial_name": "${trial_name}",
    "path": "Qwen/Qwen3-32B",
    "init_from_scratch": False,
    "disable_dropout": True,
    "dtype": "${actor.dtype}",
    "mb_spec": {"max_tokens_per_mb": 10240},
    "optimizer": None,
    "scheduling_spec": "${actor.scheduling_spec}",
}
ALL = KDRLConfig(
    rl_loss_weight=0.5,
    distill_loss_weight=0.02,
    clip_low=0.1,
    clip_high=0.28,
    dual_clip=3.0,
    kd_discount=0.5,
    kd_reward_clip=2.0,
    kd_max_ratio=4.0,
    reduction="sequence_mean",
)


def test_the_block_is_read_as_it_stands():
    config = KDRLConfig.from_mapping(BLOCK)
    assert (config.rl_loss_weight, config.distill_loss_weight) == (1.0, 0.005)
    assert config == KDRLConfig(distill_loss_weight=0.005)
    assert config.ignored == {k: x for k, x in BLOCK.items() if k not in ("rl_loss_weight", "distill_loss_weight")}


def test_what_was_set_is_taken_and_the_rest_keeps_its_default():
    config = KDRLConfig.from_mapping({**BLOCK, "rl_loss_weight": 0, "kd_discount": 1, "clip_high": 0.28})
    assert config == KDRLConfig(rl_loss_weight=0, distill_loss_weight=0.005, kd_discount=1, clip_high=0.28)
    assert KDRLConfig.from_mapping({"distill_loss_weight": 0.3}) == KDRLConfig(distill_loss_weight=0.3)


@pytest.mark.parametrize(
    "block", [{}, {"rl_loss_weight": 1.0, "path": "Qwen/Qwen3-32B"}, {"distill_loss_weight": None}]
)
def test_a_block_without_the_weight_of_the_teacher_names_the_page(block):
    with pytest.raises(
        ValueError, match=r"block must hold distill_loss_weight: docs/weights\.md .*; 0 leaves the teacher"
    ):
        KDRLConfig.from_mapping(block)
    assert KDRLConfig.from_mapping({**block, "distill_loss_weight": 0}).distill_loss_weight == 0


def test_a_config_without_the_weight_of_the_teacher_names_the_page():
    for wrong in ((), (1.0,), (1.0, 0.005)):
        with pytest.raises(TypeError, match=r"distill_loss_weight of KDRLConfig must be given: docs/weights\.md"):
            KDRLConfig(*wrong)
    with pytest.raises(TypeError, match="positional argument"):  # where the weight was, no other field may be
        KDRLConfig(1.0, 0.1, distill_loss_weight=1.0)


def test_any_mapping_will_do():
    assert KDRLConfig.from_mapping(types.MappingProxyType(BLOCK)) == KDRLConfig.from_mapping(BLOCK)


def test_the_block_is_not_changed():
    before = copy.deepcopy(BLOCK)
    KDRLConfig.from_mapping(BLOCK)
    assert before == BLOCK


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("distil_loss_weight", "distill_loss_weight"),
        ("distill_weight", "distill_loss_weight"),
        ("rl_weight", "rl_loss_weight"),
        ("clip_hi", "clip_high"),
        ("kd_discnt", "kd_discount"),
        ("mb_specs", "mb_spec"),  # an engine's key can be mistyped too
        ("direct-penalty", "direct_penalty"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(key, nearest):
    with pytest.raises(ValueError, match=f"unknown key {key!r}; the nearest valid key is {nearest!r}"):
        KDRLConfig.from_mapping({**BLOCK, key: 1.0})


@pytest.mark.parametrize("key", ["ignored", 3, ""])
def test_a_key_that_resembles_nothing_is_unknown_all_the_same(key):
    with pytest.raises(ValueError, match=rf"unknown key {key!r}; the nearest valid key is '\w+'"):
        KDRLConfig.from_mapping({**BLOCK, key: 1.0})


def test_a_block_that_is_no_mapping():
    with pytest.raises(TypeError, match=r"block must be a mapping .*, got list"):
        KDRLConfig.from_mapping([("rl_loss_weight", 1.0)])


# Valid numbers per field, and None where the field may be omitted.
NUMBERS = [f.name for f in dataclasses.fields(KDRLConfig) if "float" in str(f.type)]
WEIGHT = {"distill_loss_weight": 1.0}


@pytest.mark.parametrize("name", NUMBERS)
def test_text_is_no_number_and_the_message_says_how_yaml_came_to_it(name):
    """YAML 1.1 reads 5e-3 as text, 5.0e-3 and 0.005 as numbers."""
    with pytest.raises(TypeError, match=rf"{name} must be a Python number, got str '5e-3' \(YAML reads 5e-3 as text"):
        KDRLConfig.from_mapping({**BLOCK, name: "5e-3"})


@pytest.mark.parametrize("value", [True, [0.1], torch.tensor(0.1)], ids=["bool", "list", "tensor"])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_a_type_error(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be a Python number, got {type(value).__name__} "):
        KDRLConfig(**WEIGHT | {name: value})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(KDRLConfig) if f.type == "float"])
def test_none_is_no_number_where_the_field_has_one(name):
    with pytest.raises(TypeError, match=f"{name} must be a Python number, got NoneType None"):
        KDRLConfig(**WEIGHT | {name: None})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rl_loss_weight", math.inf, "rl_loss_weight must be finite, got inf"),
        ("distill_loss_weight", math.nan, "distill_loss_weight must be finite, got nan"),
        ("clip_low", -0.1, "clip_low must be >= 0, got -0.1"),
        ("clip_high", -0.1, "clip_high must be >= 0, got -0.1"),
        ("dual_clip", 0, "dual_clip must be > 1, got 0"),
        ("dual_clip", 1.0, "dual_clip must be > 1, got 1.0"),
        ("kd_discount", -0.5, "kd_discount must be >= 0, got -0.5"),
        ("kd_discount", 1.1, "kd_discount must be in 0 .. 1, got 1.1"),
        ("kd_reward_clip", 0.0, "kd_reward_clip must be > 0, got 0.0"),
        ("kd_max_ratio", -1, "kd_max_ratio must be > 0, got -1"),
        ("reduction", "mean", "reduction must be one of 'token_mean', 'sequence_mean', got 'mean'"),
    ],
)
def test_a_value_out_of_range_fails_when_the_config_is_made(name, value, message):
    given = WEIGHT | {name: value}
    for make in (lambda: KDRLConfig(**given), lambda: KDRLConfig.from_mapping(given)):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("value", ["true", 1, None])
def test_direct_penalty_is_a_bool(value):
    with pytest.raises(TypeError, match=f"direct_penalty must be true or false, got {value!r}"):
        KDRLConfig(**WEIGHT, direct_penalty=value)


@pytest.mark.parametrize(("name", "off"), [("kd_discount", "0"), ("kd_reward_clip", "None"), ("kd_max_ratio", "None")])
def test_direct_penalty_refuses_what_shapes_a_reward(name, off):
    with pytest.raises(ValueError, match=rf"{name} must be {off} with direct_penalty=True.*got 0.5"):
        KDRLConfig(**WEIGHT, direct_penalty=True, **{name: 0.5})
    assert KDRLConfig(**WEIGHT, direct_penalty=True).direct_penalty


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALL.rl_loss_weight = 0.0


def test_replace_checks_again_and_keeps_what_was_ignored():
    config = KDRLConfig.from_mapping(BLOCK)
    changed = dataclasses.replace(config, rl_loss_weight=0.0)
    assert (changed.rl_loss_weight, changed.distill_loss_weight) == (0.0, 0.005)
    assert changed.ignored == config.ignored
    with pytest.raises(ValueError, match=r"kd_discount must be in 0 \.\. 1, got 2"):
        dataclasses.replace(config, kd_discount=2)


@pytest.mark.parametrize("config", [KDRLConfig(distill_loss_weight=0.005), ALL, KDRLConfig.from_mapping(BLOCK)])
def test_it_survives_pickling_and_copying(config):
    """A trainer sends its config to its workers."""
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert other == config
        assert other.ignored == config.ignored


def test_equality_is_of_hyperparameters():
    config = KDRLConfig(distill_loss_weight=0.005)
    assert KDRLConfig.from_mapping(BLOCK) == config
    assert KDRLConfig(distill_loss_weight=0.005, clip_low=0.1) != config != KDRLConfig(distill_loss_weight=0.05)
    assert hash(KDRLConfig.from_mapping(BLOCK)) == hash(config)


def test_fields_are_keywords_of_kdrl_loss_with_its_defaults():
    keywords = {name: p.default for name, p in inspect.signature(kdrl_loss).parameters.items()}
    given = KDRLConfig(**WEIGHT).as_kwargs()
    assert given == {name: keywords[name] for name in given} | WEIGHT
    required = inspect.Parameter.empty
    assert keywords["distill_loss_weight"] is required
    assert inspect.signature(KDRLConfig).parameters["distill_loss_weight"].default is required
    # the others are tensors, or belong to a batch
    tensors = {"logp", "old_logp", "teacher_logp", "advantages", "loss_mask", "prox_logp", "weights", "kd_mask"}
    assert set(keywords) - set(given) == tensors | {"kd_baseline", "cu_seqlens", "normalizer", "group"}


@pytest.mark.parametrize("config", [KDRLConfig.from_mapping(BLOCK), ALL])
def test_as_kwargs_feeds_kdrl_loss(config):
    generator = torch.Generator().manual_seed(0)
    logp, old_logp, teacher_logp, advantages = (-torch.rand(6, generator=generator) for _ in range(4))
    batch = {"loss_mask": torch.ones(6, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 2, 6])}
    out = kdrl_loss(logp, old_logp, teacher_logp, advantages, **batch, **config.as_kwargs())
    by_hand = kdrl_loss(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        **batch,
        rl_loss_weight=config.rl_loss_weight,
        distill_loss_weight=config.distill_loss_weight,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        kd_discount=config.kd_discount,
        kd_reward_clip=config.kd_reward_clip,
        kd_max_ratio=config.kd_max_ratio,
        reduction=config.reduction,
    )
    assert out.loss == by_hand.loss != 0
    assert out.loss == config.rl_loss_weight * out.rl + config.distill_loss_weight * out.kd


def test_direct_penalty_reaches_the_loss():
    logp = torch.tensor([-0.5, -1.0])
    kwargs = KDRLConfig(direct_penalty=True, rl_loss_weight=0.0, distill_loss_weight=1.0).as_kwargs()
    with pytest.warns(UserWarning, match="the teacher is not in its gradient"):
        out = kdrl_loss(logp, None, logp - 1, None, loss_mask=torch.ones(2, dtype=torch.bool), **kwargs)
    assert out.loss == out.reverse_kl == 1
