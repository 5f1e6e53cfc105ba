"""Holds `check_packed`: a right packed row passes, every wrong way to run one raises, and the model stays as it was."""

from __future__ import annotations

import doctest

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import kdloss
from kdloss.integrations import transformers as adapter
from kdloss.integrations.transformers import check_packed

V = 64
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {
    "sliding_window": 4,
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 5.0,
}
SPARSE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEPARATE = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Qwen3Moe": SPARSE,
    "Mixtral": {"num_local_experts": 4},
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 16,
}
# What lets sequences see each other with position_ids that restart: no mask made from them, a convolution, a state.
MIX = {
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "FalconH1": MAMBA,
    "Mamba": {},
    "Qwen3Next": SPARSE | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
}
FAR = "log-probs of a packed row are up to .* nats from those of each sequence alone"


def tiny(name: str = "Llama", **changes) -> nn.Module:
    """A model with random weights, of the size that its configuration sets by itself."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    return getattr(transformers, f"{name}ForCausalLM")(config(**SIZES | (SEPARATE | MIX)[name] | changes)).eval()


class Way(nn.Module):
    """A way to call a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool | None = None):
        if position_ids is None:
            return self.model(input_ids=input_ids)
        return self.packed(input_ids, position_ids)


class Right(Way):
    def packed(self, input_ids, position_ids):
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)


class NoPositions(Way):
    def packed(self, input_ids, position_ids):
        return self.model(input_ids=input_ids, use_cache=False)


class PositionsThatDoNotRestart(Way):
    def packed(self, input_ids, position_ids):
        position_ids = torch.arange(input_ids.shape[1])[None]
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)


class DefaultCache(Way):
    def packed(self, input_ids, position_ids):
        return self.model(input_ids=input_ids, position_ids=position_ids)


class MaskOfOnes(Way):
    def packed(self, input_ids, position_ids):
        mask = torch.ones_like(input_ids)
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, attention_mask=mask)


WRONG = (NoPositions, PositionsThatDoNotRestart, DefaultCache, MaskOfOnes)


@pytest.mark.parametrize("lengths", [(5, 7), (1, 1), (30, 1, 9)])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in SEPARATE
        for attention in ("eager", "sdpa")
        if (name, attention) != ("Gemma2", "sdpa")
    ],
)
def test_a_packed_row_is_its_sequences(name, attention, lengths):
    model = tiny(name)
    model.set_attn_implementation(attention)
    assert check_packed(model, lengths=lengths) < 1e-6
    assert check_packed(Right(model), lengths=lengths) < 1e-6
    assert check_packed(model.bfloat16(), lengths=lengths) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WRONG)
@pytest.mark.parametrize("name", SEPARATE)
def test_every_wrong_way_raises(name, way, dtype):
    model = tiny(name).to(dtype)
    with pytest.raises(ValueError, match=FAR):
        check_packed(way(model))
    with pytest.raises(ValueError, match=FAR), torch.autocast("cpu", torch.bfloat16):
        check_packed(way(model))


@pytest.mark.parametrize("name", MIX)
def test_models_that_do_not_separate_sequences_are_found_and_padded_rows_work(name):
    """With the initial weights the convolutions of LFM2 leak 3e-5 nats, and those of Falcon-H1 1e-4."""
    model = tiny(name)
    with pytest.raises(ValueError, match=FAR):
        check_packed(model)
    rows = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5, 7])
    mask = torch.arange(7) < lengths[:, None]
    with torch.no_grad():
        padded = model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits
        alone = [
            model(input_ids=row[None, :n], use_cache=False).logits[0] for row, n in zip(rows, lengths, strict=True)
        ]
    torch.testing.assert_close(kdloss.pack(padded, lengths=lengths), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_an_attention_without_masks_is_found_and_another_one_works():
    """transformers makes no mask for an attention function that it does not know."""

    def causal(module, query, key, value, attention_mask, **keywords):
        assert attention_mask is None
        x = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return x.transpose(1, 2), None

    transformers.AttentionInterface.register("causal_alone", causal)
    model = tiny()
    model.set_attn_implementation("causal_alone")
    with pytest.raises(ValueError, match=r"load it with another attn_implementation"):
        check_packed(model)
    model.set_attn_implementation("sdpa")
    assert check_packed(model) < 1e-6


def test_positions_alone_can_be_wrong():
    """No sequence sees another, but learned positions go on from one to the next."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.positions, self.head = nn.Embedding(V, 8), nn.Embedding(32, 8), nn.Linear(8, V)

        def forward(self, input_ids, position_ids=None, use_cache=None):
            return self.head(self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1])))

    with pytest.raises(ValueError, match=FAR):
        check_packed(Model())


def test_a_head_of_zeros_hides_everything():
    model = tiny()
    nn.init.zeros_(model.lm_head.weight)
    for way in (Right, *WRONG):
        with pytest.raises(ValueError, match=r"cannot tell .* within 0\.0e\+00 nats .* pass a model with random"):
            check_packed(way(model))
    model.lm_head.weight.data.normal_(std=0.02)
    assert check_packed(model) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_does_not_pass(bad):
    model = tiny()
    model.lm_head.weight.data[7] = bad
    with pytest.raises(ValueError, match="log-probs of the model are NaN"):
        check_packed(model)


def test_tokens_that_a_model_excludes_are_no_difference():
    model = tiny()

    def exclude(module, args, logits):
        return logits.masked_fill(torch.arange(V) > 50, -torch.inf)

    model.lm_head.register_forward_hook(exclude)
    assert check_packed(model) < 1e-6
    with pytest.raises(ValueError, match=FAR):
        check_packed(DefaultCache(model))


@pytest.mark.parametrize("way", [Right, DefaultCache])
def test_the_model_and_the_random_state_are_left_as_they_were(way):
    model = tiny(attention_dropout=0.5)
    expected = check_packed(Right(model))
    model.train()
    model.model.layers[0].eval()  # frozen by its user
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    state = torch.get_rng_state()
    wrapped = way(model)
    if way is Right:
        assert [check_packed(wrapped), check_packed(wrapped)] == [expected, expected]
    else:
        with pytest.raises(ValueError, match=FAR):
            check_packed(wrapped)
    assert [module.training for module in model.modules()] == modes
    assert wrapped.training
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapted_model():
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert check_packed(model) < 1e-6
    with pytest.raises(ValueError, match=FAR):
        check_packed(DefaultCache(model))


def test_a_compiled_model():
    model = torch.compile(tiny(num_hidden_layers=1), backend="eager", dynamic=True)
    assert check_packed(model) < 1e-6


def test_the_digits_of_a_product_set_the_bound():
    assert adapter._multiplies_in_float32(torch.device("cpu"))
    model = tiny(num_hidden_layers=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not adapter._multiplies_in_float32(torch.device("cpu"))
        assert 1e-5 < check_packed(model, lengths=(40, 1, 60)) < 0.02


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, input_ids, position_ids=None, use_cache=None):
        return self.output


@pytest.mark.parametrize(
    ("model", "lengths", "error", "message"),
    [
        (
            lambda **keywords: torch.zeros(1, 1, V),
            (5, 7),
            TypeError,
            r"model must be a torch\.nn\.Module, got function",
        ),
        (Returns(None), (5, 7), TypeError, r"model must return logits, or an output with \.logits, got NoneType"),
        (Returns(torch.zeros(1, 3, V)), (5, 7), ValueError, r"logits must be \(1, 1, V\), got \(1, 3, 64\)"),
        (Returns(torch.zeros(1, V)), (5, 7), ValueError, r"logits must be \(1, 1, V\), got \(1, 64\)"),
        (nn.Identity(), 5, TypeError, "lengths must be ints, one per sequence, got 5"),
        (nn.Identity(), (5.0, 7), TypeError, r"lengths must be ints, one per sequence, got \(5\.0, 7\)"),
        (nn.Identity(), (), ValueError, r"lengths must have two or more entries, one per sequence, got \[\]"),
        (nn.Identity(), (12,), ValueError, r"lengths must have two or more entries, one per sequence, got \[12\]"),
        (nn.Identity(), (5, 0), ValueError, r"lengths must be >= 1, got \[5, 0\]"),
    ],
)
def test_bad_calls(model, lengths, error, message):
    with pytest.raises(error, match=message):
        check_packed(model, lengths=lengths)


def test_a_model_without_a_head_has_no_logits():
    with pytest.raises(TypeError, match=r"or an output with \.logits, got BaseModelOutputWithPast"):
        check_packed(tiny().model)


def test_lengths_may_be_a_tensor():
    assert check_packed(tiny(), lengths=torch.tensor([2, 3])) < 1e-6


def test_the_example_runs():
    assert doctest.testmod(adapter).failed == 0
