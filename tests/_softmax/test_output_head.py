"""Holds `output_head` of plain modules: which weight and bias it returns, and which modules it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import kdloss

D, V = 6, 11


def hidden_and_labels():
    torch.manual_seed(1)
    return torch.randn(5, D, requires_grad=True), torch.randint(0, V, (5,))


def head_logp(module, hidden, labels):
    weight, bias, softcap, logit_scale = kdloss.output_head(module)
    return kdloss.linear_token_logprobs(hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale)


def gradients(logp, module, hidden):
    leaves = [hidden, *(p for p in module.parameters() if p.requires_grad)]
    return torch.autograd.grad(logp.square().sum(), leaves)


def assert_like_its_forward(module, forward=None):
    """Log-probs, and gradients of hidden states and of every parameter, are those of the module's own logits."""
    hidden, labels = hidden_and_labels()
    ours, own = head_logp(module, hidden, labels), kdloss.token_logprobs((forward or module)(hidden), labels)
    torch.testing.assert_close(ours, own)
    for a, b in zip(gradients(ours, module, hidden), gradients(own, module, hidden), strict=True):
        torch.testing.assert_close(a, b)


class Other(nn.Module):
    """A head of another class: weight (V, D), and a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, D))
        self.bias = nn.Parameter(torch.randn(V))
        self.forward = forward.__get__(self)


def plain(self, x):
    return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_its_weight_and_bias(bias):
    head = nn.Linear(D, V, bias=bias)
    found = kdloss.output_head(head)
    assert found.weight is head.weight
    assert found.bias is head.bias
    assert found[2:] == (None, 1.0)
    assert_like_its_forward(head)


def test_an_embedding_is_the_weight_of_the_head_that_is_tied_to_it():
    embedding = nn.Embedding(V, D)
    assert kdloss.output_head(embedding) == (embedding.weight, None, None, 1.0)
    assert_like_its_forward(embedding, lambda hidden: hidden @ embedding.weight.T)


def test_another_class_with_a_weight_is_taken_where_it_multiplies_with_it():
    assert_like_its_forward(Other(plain))


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_the_gradient_of_a_parametrized_weight_reaches_its_parameters(make):
    assert_like_its_forward(make(nn.Linear(D, V)))


def test_a_weight_that_is_a_property_of_other_parameters_is_taken():
    class Factored(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(V, 2)), nn.Parameter(torch.randn(2, D))

        @property
        def weight(self):
            return self.a @ self.b

        def forward(self, x):
            return x @ self.weight.T

    assert_like_its_forward(Factored())


def test_a_compiled_module_is_looked_through():
    head = nn.Linear(D, V)
    assert kdloss.output_head(torch.compile(head)).weight is head.weight


def test_a_hook_that_changes_nothing_is_allowed():
    head, seen = nn.Linear(D, V), []
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert kdloss.output_head(head).weight is head.weight
    assert seen == [(3, V)]  # the rows of the comparison


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_dtype_and_device_of_a_linear_layer(dtype, device):
    head = nn.Linear(D, V, dtype=dtype, device=device)
    assert kdloss.output_head(head).weight is head.weight


def test_a_comparison_in_bfloat16_allows_its_rounding():
    kdloss.output_head(Other(plain).bfloat16())


def adapted():
    head = nn.Linear(D, V)
    head.base_layer, head.extra = nn.Linear(D, V), nn.Linear(D, V, bias=False)
    head.forward = lambda x: plain(head, x) + 0 * head.extra(x)
    return head


def scaled():
    head = nn.Linear(D, V)
    head.register_forward_hook(lambda module, args, out: 1.01 * out)
    return head


def float8():
    head = nn.Linear(D, V, bias=False)
    head.weight = nn.Parameter(head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return head


def integers():
    head = nn.Linear(D, V, bias=False)
    head.weight = nn.Parameter(torch.ones(V, D, dtype=torch.int8), requires_grad=False)
    return head


def flattened():
    head = nn.Linear(D, V)
    head.weight = nn.Parameter(torch.ones(V * D))
    return head


MUST = "module must make its logits as hidden @ weight.T + bias, got "
FROM_LOGITS = "or take log-probs from the model's own logits with token_logprobs"
REFUSED = {
    "parameters beside its weight": (
        adapted,
        f"{MUST}Linear, whose parameters extra.weight are",
    ),
    "a hook that scales": (scaled, f"{MUST}Linear, whose output differs from that by 0.01 of the largest logit"),
    "a forward that caps": (lambda: Other(lambda self, x: plain(self, x).tanh()), f"{MUST}Other, whose output differs"),
    "a forward that is NaN": (
        lambda: Other(lambda self, x: plain(self, x) * torch.nan),
        f"{MUST}Other, whose output ...",
    ),
    "a forward that raises": (
        lambda: Other(lambda self, x: self.missing),
        f"{MUST}Other, which does not run on hidden states (3, D), AttributeError",
    ),
    "another class on meta": (lambda: Other(plain).to("meta"), f"{MUST}Other, which cannot be compared"),
    "no weight": (lambda: nn.Sequential(nn.Linear(D, V)), "module must have a weight (V, D), or get_output_embed..."),
    "float8": (float8, "module must have a floating-point weight, got Linear with Parameter in torch.float8_e4m3fn"),
    "int8": (integers, "module must have a floating-point weight, got Linear with Parameter in torch.int8"),
    "a flattened weight": (
        flattened,
        "module must hold a weight (V, D), got Linear with (66,), split or freed: under FSDP1",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_weight_and_bias_express_is_refused_with_the_way_out(what):
    make, message = REFUSED[what]
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    with pytest.raises(TypeError if "8" in what else ValueError, match=pattern) as caught:
        kdloss.output_head(make())
    assert FROM_LOGITS in str(caught.value)


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got Parameter"):
        kdloss.output_head(nn.Linear(D, V).weight)


def test_a_model_without_a_head_is_refused():
    model = nn.Linear(D, V)
    model.get_output_embeddings = lambda: None
    with pytest.raises(
        ValueError, match="get_output_embeddings returns NoneType: pass the module that makes its logits"
    ):
        kdloss.output_head(model)


def test_a_whole_output_head_in_place_of_its_weight_is_told_to_unpack_it():
    hidden, labels = hidden_and_labels()
    with pytest.raises(TypeError, match="got OutputHead; use weight, bias, softcap, logit_scale = kdloss"):
        kdloss.linear_token_logprobs(hidden, kdloss.output_head(nn.Linear(D, V)), labels)


class Capped(torch.nn.Linear):
    """A softcap inside the head's own forward."""

    cap = 30.0

    def forward(self, hidden):
        return self.cap * torch.tanh(super().forward(hidden) / self.cap)


class Clamped(Capped):
    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight, self.bias).clamp(-100, 100)


@pytest.mark.parametrize("head", [Capped, Clamped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_that_bounds_its_logits_is_refused(head, dtype):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"differs from that by .* of the largest logit"):
        kdloss.output_head(head(2048, 100, bias=False).to(dtype))


def test_a_head_of_another_class_may_start_at_zero_and_a_weight_that_is_not_finite_is_named():
    class Own(torch.nn.Linear):
        def forward(self, hidden):
            return hidden @ self.weight.T + self.bias

    head = Own(3, 5)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    assert kdloss.output_head(head).weight is head.weight
    torch.nn.init.constant_(head.weight, float("nan"))
    with pytest.raises(ValueError, match="whose weight or bias is not finite"):
        kdloss.output_head(head)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_works_every_time():
    head = torch.nn.utils.weight_norm(torch.nn.Linear(3, 5))
    for _ in range(3):
        head(torch.randn(2, 3))
        kdloss.output_head(head).weight.sum().backward()
    assert head.weight_g.grad.abs().sum() > 0


def test_parameters_that_are_in_neither_weight_nor_bias_are_named_though_they_are_frozen():
    class Own(torch.nn.Linear):
        def __init__(self):
            super().__init__(3, 5)
            self.small = torch.nn.Parameter(torch.full((5,), 1e-9), requires_grad=False)

        def forward(self, hidden):
            return super().forward(hidden) + self.small

    with torch.no_grad(), pytest.raises(ValueError, match="whose parameters small are in neither"):
        kdloss.output_head(Own())


def test_a_convolution_is_no_head():
    with pytest.raises(ValueError, match=r"with a weight \(V, D\), got Conv1d with \(30, 8, 1\)"):
        kdloss.output_head(torch.nn.Conv1d(8, 30, 1))
