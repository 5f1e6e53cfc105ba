"""Holds `output_head` of models of transformers and of PEFT against their own logits: values and gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

import kdloss

V, D = 24, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}

# (softcap, logit_scale) that the model's own forward applies. `logits_scaling` divides, multiplies, and divides hidden
# states; the last model's class is not known to transformers.
MODELS = {
    "Llama": ({}, None, 1.0),
    "Qwen3": ({"head_dim": 8, "tie_word_embeddings": True}, None, 1.0),
    "Phi": ({}, None, 1.0),  # a bias
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 3.0}, 3.0, 1.0),
    "Gemma3": ({"head_dim": 8, "final_logit_softcapping": 2.0}, 2.0, 1.0),
    "Granite": ({"logits_scaling": 3.0}, None, 1 / 3),
    "HyperCLOVAX": ({"logits_scaling": 3.0}, None, 3.0),
    "MiniCPM3": ({"dim_model_base": 8, **LATENT}, None, 0.5),
    "Cohere": ({"logit_scale": 0.3}, None, 0.3),
    "FalconH1": ({"lm_head_multiplier": 0.7, **MAMBA}, None, 0.7),
}


def tiny(name="Llama", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**SIZES | changes))
    with torch.no_grad():
        for key, x in model.named_parameters():
            if key.endswith("bias"):
                x.normal_()
    return model


def tokens():
    torch.manual_seed(1)
    return torch.randint(3, V, (2, 5)), torch.randint(V, (2, 5))


def hidden_states(model, ids):
    """The last hidden states of the backbone, whatever wraps it."""
    seen = []
    backbone = next(
        m for m in model.modules() if isinstance(m, transformers.PreTrainedModel) and not hasattr(m, "lm_head")
    )
    handle = backbone.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    logits = model(input_ids=ids).logits
    handle.remove()
    return seen[0], logits


def both(model):
    """Log-probs from the hidden states and `output_head`, and from the model's own logits, of one forward."""
    ids, labels = tokens()
    hidden, logits = hidden_states(model, ids)
    weight, bias, softcap, logit_scale = kdloss.output_head(model)
    found = kdloss.linear_token_logprobs(hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale)
    return found, kdloss.token_logprobs(logits, labels)


def assert_like_its_own_logits(model):
    """Equal values, and equal gradients of every trainable parameter of the model; returns the names that have one."""
    found, own = both(model)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    if not (trained and own.requires_grad):  # the adapters are disabled, or merged
        assert not (trained and found.requires_grad)
        return set()
    ours, expected = (
        torch.autograd.grad(logp.square().sum(), list(trained.values()), retain_graph=True, allow_unused=True)
        for logp in (found, own)
    )
    for name, a, b in zip(trained, ours, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).norm() <= 5e-5 * b.norm() + 1e-6, name
    return {name for name, x in zip(trained, ours, strict=True) if x is not None and x.any()}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_log_probs_of_its_own_logits(name):
    changes, softcap, logit_scale = MODELS[name]
    model = tiny(name, **changes)
    head = kdloss.output_head(model)
    assert head.softcap == softcap
    assert head.logit_scale == pytest.approx(logit_scale, rel=1e-12)
    assert_like_its_own_logits(model)


def test_the_transform_is_the_same_in_half_precision_and_on_meta():
    assert kdloss.output_head(tiny("Granite", logits_scaling=3.0).bfloat16())[2:] == (None, 1 / 3)
    assert kdloss.output_head(tiny("Gemma2", head_dim=8, final_logit_softcapping=3.0).to("meta"))[2:] == (3.0, 1.0)


def test_wrappers_are_looked_through():
    model = tiny("Granite", logits_scaling=3.0)
    assert kdloss.output_head(torch.compile(model)).logit_scale == 1 / 3
    model.generation_config, ids = None, tokens()[0]
    before = model(input_ids=ids).logits
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))  # what device_map does
    add_hook_to_module(model.lm_head, AlignDevicesHook(io_same_device=True))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert kdloss.output_head(model).logit_scale == 1 / 3


class Own(transformers.LlamaForCausalLM):
    """A model whose forward is not that of transformers."""

    def change(self, logits):
        raise NotImplementedError

    def forward(self, input_ids=None, **kwargs):
        out = self.model(input_ids=input_ids, **kwargs)
        logits = self.change(self.lm_head(out.last_hidden_state))
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def own(change):
    torch.manual_seed(0)
    model = Own(transformers.LlamaConfig(**SIZES))
    model.__class__ = type("Own", (Own,), {"change": change})
    return model


def test_a_forward_of_its_own_is_measured_too():
    model = own(lambda self, z: 2.5 * torch.tanh(0.4 * z / 2.5))
    head = kdloss.output_head(model)
    assert (head.softcap, head.logit_scale) == (pytest.approx(2.5), pytest.approx(0.4, rel=1e-12))
    assert_like_its_own_logits(model)


CHANGED = {
    "masks": lambda self, z: z.index_fill(-1, torch.tensor([3]), -torch.inf),
    "shifts": lambda self, z: z + 1e-3,
    "clips": lambda self, z: z.clamp(-3, 3),
    "rounds": lambda self, z: z.bfloat16().float(),
    "reads a parameter": lambda self, z: z * self.lm_head.weight.norm(dim=1) ** 2,
    "depends on the row": lambda self, z: z * torch.arange(1, 1 + z.shape[1])[:, None],
}


@pytest.mark.parametrize("what", CHANGED)
def test_logits_that_are_not_scaled_and_capped_are_refused_with_the_way_out(what):
    model = own(CHANGED[what])
    with pytest.raises(
        ValueError, match=r"module must scale and cap the logits of its head, got Own: .* pass its head"
    ):
        kdloss.output_head(model)
    assert kdloss.output_head(model.get_output_embeddings())[2:] == (None, 1.0)


def test_a_head_that_another_module_owns_is_refused_with_the_name_of_the_owner():
    model = tiny()
    outer = nn.Module()
    outer.language_model, outer.get_output_embeddings = model, model.get_output_embeddings
    with pytest.raises(ValueError, match="its head belongs to its module language_model; pass its head"):
        kdloss.output_head(outer)
    kdloss.output_head(outer.language_model)


# --- PEFT -----------------------------------------------------------------------------------------------------------


def with_adapter(model=None, *, seed=3, **options):
    """A model with an adapter on its head and on its attention, whose parameters are random: PEFT starts at 0."""
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["lm_head", "q_proj"]} | options
    model = get_peft_model(model or tiny("Granite", logits_scaling=3.0), LoraConfig(**options))
    randomize(model, seed)
    return model


def randomize(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.add_(0.3 * torch.randn_like(x))


ADAPTERS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "with a trained bias": {"lora_bias": True},
    "with dropout, in eval mode": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("base", ["Granite", "Phi"])  # without and with a bias
def test_an_adapted_head_has_the_values_and_the_gradients_of_its_own_forward(base, options):
    model = with_adapter(tiny(base, **MODELS[base][0]), **options).eval()
    trained = assert_like_its_own_logits(model)
    parts = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if "use_dora" in options else [])}
    assert {name.split(".")[-3] for name in trained if "lm_head" in name} >= parts
    no_adapter = kdloss.output_head(model.get_base_model().lm_head.base_layer).weight
    assert not torch.allclose(kdloss.output_head(model).weight, no_adapter, atol=0.1)


def test_no_gradient_is_needed_of_a_frozen_adapted_teacher():
    model = with_adapter(use_dora=True).eval().requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(*both(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("first", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_several_active_adapters_add_up_as_in_the_forward(first, second):
    model = with_adapter(tiny("Phi"), **first)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], **second))
    randomize(model, 4)
    model.base_model.set_adapter(["default", "other"])
    trained = assert_like_its_own_logits(model)
    assert {name.split(".")[-2] for name in trained if "lm_head.lora_A" in name} == {"default", "other"}


def test_inactive_disabled_and_merged_adapters_are_as_the_forward_has_them():
    model = with_adapter()
    adapted = kdloss.output_head(model).weight
    with model.disable_adapter():
        assert kdloss.output_head(model).weight is model.get_base_model().lm_head.base_layer.weight
        assert_like_its_own_logits(model)
    model.merge_adapter()
    torch.testing.assert_close(kdloss.output_head(model).weight, adapted)
    assert_like_its_own_logits(model)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"call unmerge_adapter\(\) of the PEFT model"):
        kdloss.output_head(model)
    model.unmerge_adapter()
    assert_like_its_own_logits(model)


def test_an_adapter_in_float32_is_not_rounded_to_the_base_in_bfloat16():
    model = with_adapter(tiny().bfloat16())
    assert model.get_base_model().lm_head.lora_A["default"].weight.dtype == torch.float32
    assert kdloss.output_head(model).weight.dtype == torch.float32


def test_modules_to_save_are_the_copy_that_is_trained():
    model = with_adapter(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
    assert kdloss.output_head(model).weight is wrapper.modules_to_save["default"].weight
    assert any("lm_head" in name for name in assert_like_its_own_logits(model))
    with model.disable_adapter():
        assert kdloss.output_head(model).weight is wrapper.original_module.weight
        assert_like_its_own_logits(model)


def test_an_adapter_beside_a_tied_head_leaves_the_head_as_it_is():
    model = with_adapter(tiny("Qwen3", head_dim=8, tie_word_embeddings=True), target_modules=["q_proj"])
    assert kdloss.output_head(model).weight is model.get_input_embeddings().weight
    assert_like_its_own_logits(model)


def test_lora_dropout_in_training_mode_is_refused_and_each_way_out_works():
    model = with_adapter(lora_dropout=0.5).train()
    with pytest.raises(
        ValueError, match=r"got lora_dropout=0\.5 .* call eval\(\) on the head, .*or set lora_dropout=0,"
    ):
        kdloss.output_head(model)
    model.get_base_model().lm_head.eval()
    assert kdloss.output_head(model).weight.requires_grad
    assert_like_its_own_logits(with_adapter(lora_dropout=0.0).train())


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(target_modules=["lm_head"]),
        LoraConfig(target_modules=["lm_head"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    ],
    ids=["LoHa", "aLoRA"],
)
def test_other_adapters_are_refused_with_the_way_out(config):
    model = get_peft_model(tiny(), config)
    with pytest.raises(
        ValueError, match=r"as hidden @ weight\.T \+ bias, .*take log-probs from the model's own logits"
    ):
        kdloss.output_head(model)
    ids, labels = tokens()
    kdloss.token_logprobs(model(input_ids=ids).logits, labels)


def test_a_whole_layer_of_peft_is_taken_like_its_model():
    model = with_adapter()
    layer = model.get_base_model().lm_head
    torch.testing.assert_close(kdloss.output_head(layer).weight, kdloss.output_head(model).weight)
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="differs from that by"):
        kdloss.output_head(layer)


def test_a_model_with_forward_hooks_is_refused_and_its_head_is_taken():
    model = tiny("Llama")

    def sharpen(module, inputs, outputs):
        outputs.logits = outputs.logits / 0.5
        return outputs

    model.register_forward_hook(sharpen)
    with pytest.raises(ValueError, match=r"its forward hooks may change them; pass its head, output_head\("):
        kdloss.output_head(model)
    weight, bias, *_ = kdloss.output_head(model.get_output_embeddings())
    ids = torch.tensor([[1, 2, 3]])
    hidden = model.model(ids).last_hidden_state
    found = kdloss.linear_token_logprobs(hidden, weight, ids, bias=bias, logit_scale=2.0)
    torch.testing.assert_close(found, kdloss.token_logprobs(model(ids).logits, ids))
