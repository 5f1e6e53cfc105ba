"""Holds divergences from two sets of logits: gradients, limits, -inf, error against float64, strides and blocks.

Values and gradients against the oracles, error texts and compilation are tested in `every_function`.

Tolerances: gradcheck's own (central differences in float64); otherwise multiples of the dtype's rounding, stated there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss
from decimals import MIXTURES, SHARES, assert_mixture
from kdloss.testing import reference
from kdloss.testing._oracles.divergences import distribution

V = 7
FORMS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
}
every_form = pytest.mark.parametrize("name", FORMS)
HALF = (torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def form(name: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(getattr(kdloss, name), **(FORMS[name] | options))


def textbook(name: str, logits: Tensor, teacher_logits: Tensor, **shares: float) -> Tensor:
    """The definition in probabilities, for autograd to differentiate."""
    q, p = logits.softmax(-1), teacher_logits.softmax(-1)
    (share,) = (shares or FORMS[name] or {"": 0.5}).values()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "generalized_jsd": lambda: (
            share * kl(p, share * p + (1 - share) * q) + (1 - share) * kl(q, share * p + (1 - share) * q)
        ),
        "skewed_forward_kl": lambda: kl(p, share * p + (1 - share) * q),
        "skewed_reverse_kl": lambda: kl(q, (1 - share) * p + share * q),
        "total_variation": lambda: 0.5 * (p - q).abs().sum(-1),
    }[name]()


def gradient(value: Tensor, of: Tensor, upstream: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(value, of, torch.ones_like(value) if upstream is None else upstream)[0]


# Gradients


@every_form
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)},
        {"temperature": torch.tensor(1.7, dtype=torch.float64), "vocab_size": V - 2},
    ],
    ids=["defaults", "temperature", "temperature per row", "vocab_size"],
)
def test_gradients(name, options):
    teacher = normal(4, V, seed=1)
    assert torch.autograd.gradcheck(lambda x: form(name, **options)(x, teacher), normal(4, V).requires_grad_())


@every_form
def test_it_is_autograd_on_the_textbook(name):
    logits, teacher, upstream = normal(5, 2, V).requires_grad_(), normal(5, 2, V, seed=1), normal(5, 2, seed=2)
    value, expected = form(name)(logits, teacher), textbook(name, logits, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
    found, exact = gradient(value, logits, upstream), gradient(expected, logits, upstream)
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-15)


def test_the_reverse_kl_has_the_expected_gradient_of_sampling():
    """The reverse-KL surrogate at every token of the vocabulary, weighted by its probability."""
    logits, teacher = normal(V).requires_grad_(), normal(V, seed=1)
    every = torch.arange(V)
    logp = kdloss.token_logprobs(logits.expand(V, V), every)
    teacher_logp = teacher.log_softmax(-1)
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=every >= 0)
    sampled = kdloss.importance_sampled_surrogate(logp, None, reward, loss_mask=every >= 0).loss
    expected = gradient((logp.detach().exp() * sampled).sum(), logits)
    torch.testing.assert_close(gradient(kdloss.reverse_kl(logits, teacher), logits), expected)


@every_form
def test_the_teacher_gets_no_gradient(name):
    logits, teacher = normal(3, V), normal(3, V, seed=1).requires_grad_()
    assert not form(name)(logits, teacher).requires_grad
    value = form(name)(logits.requires_grad_(), teacher)
    assert torch.autograd.grad(value.sum(), teacher, allow_unused=True) == (None,)


@every_form
def test_a_gradient_of_the_gradient_raises(name):
    """It is not defined here; without an error it would be a wrong second derivative."""
    logits = normal(3, V).requires_grad_()
    (first,) = torch.autograd.grad(form(name)(logits, normal(3, V, seed=1)).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"grad"):
        torch.autograd.grad(first.sum(), logits)


@pytest.mark.slow
@every_form
def test_the_operator_is_well_formed(name):
    arguments = (name, 0.3, 0.7, V - 1, False)
    leaf, teacher = normal(2, 3, V).requires_grad_(), normal(2, 3, V, seed=1)
    torch.library.opcheck(torch.ops.kdloss.divergence.default, (leaf, teacher, None, *arguments))
    torch.library.opcheck(torch.ops.kdloss.divergence.default, (leaf, teacher, normal(2, 3).exp(), *arguments))


# Known values


def test_golden_values():
    q, p = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.5, 0.3, 0.2), (0.2, 0.5, 0.3)))
    q.requires_grad_()
    close = partial(torch.testing.assert_close, rtol=0, atol=6e-11)
    reverse = kdloss.reverse_kl(q, p)
    close(reverse, torch.tensor(0.2238046572, dtype=torch.float64))
    close(gradient(reverse, q), torch.tensor([0.3462430373, -0.2203890843, -0.1258539531], dtype=torch.float64))
    close(gradient(kdloss.forward_kl(q, p), q), torch.tensor([0.3, -0.2, -0.1], dtype=torch.float64))
    for beta, value in ((0.1, 0.0175625983), (0.5, 0.0508746125), (0.9, 0.0196612263)):
        close(kdloss.generalized_jsd(q, p, beta=beta), torch.tensor(value, dtype=torch.float64))


# Limits and symmetry


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("end", "limit"), [(0, kdloss.forward_kl), (1, kdloss.reverse_kl)])
def test_a_jsd_close_to_its_ends_keeps_its_digits(dtype, epsilon, end, limit):
    """JSD / (β (1-β)) against extended precision, and against the KL that it tends to."""
    beta = epsilon if end == 0 else 1 - epsilon
    logits, teacher = normal(6, 50, dtype=dtype, scale=2).requires_grad_(), normal(6, 50, seed=1, dtype=dtype, scale=2)
    scaled = kdloss.generalized_jsd(logits, teacher, beta=beta) / (beta * (1 - beta))
    x, y = (t.detach().numpy().astype(np.longdouble) for t in (logits, teacher))
    q, p = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y))
    b = np.longdouble(beta)
    of_p, of_q = -np.log1p((1 - b) * (q / p - 1)), -np.log1p(b * (p / q - 1))  # log p/m, log q/m
    exact = (b * (p * of_p).sum(-1) + (1 - b) * (q * of_q).sum(-1)) / (b * (1 - b))
    # 32 roundings: every term has log-probs of size 10
    error = np.abs(scaled.detach().numpy() - exact) / exact
    # 1 - β was rounded before: in float64, that is 1e-10 of 1e-6
    assert error.max() < 32 * torch.finfo(dtype).eps + (1e-16 / epsilon if end else 0)
    found = gradient(scaled, logits)
    limit_leaf = logits.detach().double().requires_grad_()
    kl = limit(limit_leaf, teacher.double())
    # the next term of the expansion is epsilon times a second moment of the ratio, here up to 1300
    far = 1500 * epsilon + 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(scaled.double(), kl, rtol=far, atol=far)
    torch.testing.assert_close(found.double(), gradient(kl, limit_leaf), rtol=far, atol=far)


@pytest.mark.parametrize(
    ("skewed", "limit"), [("skewed_forward_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")]
)
def test_skewed_forms_tend_to_the_kl(skewed, limit):
    logits, teacher = normal(6, 20).requires_grad_(), normal(6, 20, seed=1)
    value = getattr(kdloss, skewed)(logits, teacher, alpha=1e-9)
    expected = getattr(kdloss, limit)(logits, teacher)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient(value, logits), gradient(expected, logits), rtol=0, atol=1e-7)
    # and to 0 at the other end
    assert getattr(kdloss, skewed)(logits, teacher, alpha=1 - 1e-9).max() < 1e-15


@pytest.mark.parametrize(
    ("name", "route"),
    [
        *itertools.product(MIXTURES, ("logits", "linear")),
        *itertools.product(MIXTURES[:1], ("topk bucket", "topk renormalize", "topk truncate")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_a_mixture_of_any_share_keeps_its_digits(name, share, dtype, route):
    logits, teacher = normal(4, V, dtype=dtype, scale=2).requires_grad_(), normal(4, V, seed=1, dtype=dtype, scale=2)
    options = {next(iter(FORMS[name])): share}
    if route == "logits":
        value = getattr(kdloss, name)(logits, teacher, **options)
    elif route == "linear":
        head = torch.eye(V, dtype=dtype)
        value = getattr(kdloss, f"linear_{name}")(
            logits, head, teacher, head, loss_mask=torch.ones(4, dtype=torch.bool), **options
        )
    else:
        ids = torch.arange(V).expand(4, V)
        value = kdloss.topk_generalized_jsd(
            logits, teacher.log_softmax(-1), ids, tail=route.removeprefix("topk "), **options
        )
    assert_mixture(name, share, logits, teacher, value)


def test_a_share_without_digits_below_1_is_the_kl():
    """1 - 1e-17 is 1 in float64, and its log1p is undefined."""
    logits, teacher = normal(6, 20).requires_grad_(), normal(6, 20, seed=1)
    value, expected = kdloss.skewed_reverse_kl(logits, teacher, alpha=1e-17), kdloss.reverse_kl(logits, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(value, logits), gradient(expected, logits), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.001, 0.1, 0.5, 0.8])
def test_symmetry(beta):
    a, b = normal(6, V), normal(6, V, seed=1)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
    close(kdloss.generalized_jsd(a, b, beta=beta), kdloss.generalized_jsd(b, a, beta=1 - beta))
    close(kdloss.skewed_forward_kl(a, b, alpha=beta), kdloss.skewed_reverse_kl(b, a, alpha=beta))
    close(kdloss.forward_kl(a, b), kdloss.reverse_kl(b, a))


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_nothing_to_learn_from_an_equal_teacher(name, dtype):
    """0 and no gradient at p = q, also with excluded tokens and with a constant added to all logits of a row."""
    logits = normal(5, 100, dtype=dtype, scale=3)
    logits[:, ::7] = -math.inf
    for teacher in (logits.clone(), logits + 4):
        leaf = logits.clone().requires_grad_()
        value = form(name)(leaf, teacher)
        exact = name in ("forward_kl", "reverse_kl") and torch.equal(teacher, logits)
        computed_in = torch.float64 if dtype == torch.float64 else torch.float32
        # adding the constant rounds the logits, of size 16
        eps = torch.finfo(computed_in if torch.equal(teacher, logits) else dtype).eps
        bound = 0 if exact else 32 * eps
        assert value.abs().max() <= bound
        if name == "total_variation" and not torch.equal(teacher, logits):
            continue  # its gradient has the sign of the rounding, and does not shrink
        assert gradient(value, leaf).abs().max() <= bound


# Masses of 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_what_is_infinite_and_what_is_not(dtype):
    neither, student, teacher, both = normal(4, V, dtype=dtype).unbind(0)
    logits, teacher_logits = normal(4, V, seed=1, dtype=dtype), torch.stack([neither, student, teacher, both])
    logits[1, 2] = logits[3, 2] = -math.inf
    teacher_logits[2, 2] = teacher_logits[3, 2] = -math.inf
    infinite = {"forward_kl": [False, True, False, False], "reverse_kl": [False, False, True, False]}
    for name in FORMS:
        leaf = logits.clone().requires_grad_()
        value = form(name)(leaf, teacher_logits)
        expected = torch.tensor(infinite.get(name, [False] * 4))
        assert torch.equal(value == math.inf, expected)
        assert value[~expected].isfinite().all()
        found = gradient(value, leaf)
        assert found[~expected].isfinite().all()
        assert not found[3, 2].any()
        if name == "forward_kl":  # q - p, as documented
            difference = logits.double().softmax(-1) - teacher_logits.double().softmax(-1)
            tolerance = torch.finfo(dtype).eps
            torch.testing.assert_close(found.double(), difference, rtol=tolerance, atol=max(1e-6, tolerance / 100))


def sizes(name: str, x: np.ndarray, y: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """What a rounding of eps is multiplied by on its way into the value (rows,) and into G - q sum G (rows, vocab).

    With h = 1 + |log of a mass|: a mass is the exponential of a rounded number of size h, so h is its relative error.
    d = log p - log q is off by the h of both sides, and by 4 where it is a difference of logits (`rows.py`). The
    log-ratio changes at most as d does. A mass * log-ratio is off by mass * (h * |log-ratio| + h of both sides + 4).
    The value adds the terms. The gradient of a column is off by its own term and, through q sum G, by q times the
    errors of all terms and by h of q times |sum G|. Its last 1 is the rounding of masses near 1, whose difference
    decides a sign. At most eight roundings of eps / 2 follow one another, hence the factor 4 of the caller.
    """
    with np.errstate(divide="ignore"):
        logs = [np.log(np.stack([distribution(row, temperature) for row in z])) if len(z) else z for z in (x, y)]
    q, p = (np.exp(log) for log in logs)
    of_q, of_p = (1 + np.where(np.isfinite(log), -log, 0) for log in logs)
    kl = name in ("forward_kl", "reverse_kl")
    far = 0.0 if kl else -math.log(min(FORMS[name].values(), default=1.0))  # bounds the log-ratios with a mixture
    ratio = np.where((q > 0) & (p > 0), np.abs(np.subtract(*np.where(np.isfinite(logs), logs, 0))), far)
    ratio = 1 + (ratio if kl else np.minimum(ratio, far))
    sides = {"forward_kl": [(p, of_p, of_q)], "reverse_kl": [(q, of_q, of_p)]}
    weighing = sides.get(name, [(p, of_p, of_q), (q, of_q, of_p)])
    terms = sum(mass * (own * ratio + other + 4) for mass, own, other in weighing)
    total = terms.sum(-1, keepdims=True)
    slope = sum(mass * ratio for mass, _, _ in weighing).sum(-1, keepdims=True)
    return total[:, 0], terms + q * (of_q * slope + total) + 1


@every_form
@given(data=st.data())
def test_any_shape_any_excluded_tokens_any_dtype(name, data):
    """Against the oracle: values everywhere, gradients where the value is finite."""
    rows, vocab = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32, *HALF)))
    scale = data.draw(st.sampled_from((1.0, 10.0)))
    excluded = data.draw(st.sampled_from((0.0, 0.3, 0.7)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    temperature = data.draw(st.sampled_from((1.0, 0.5)))
    generator = torch.Generator().manual_seed(seed)

    def side() -> Tensor:
        x = (scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)
        out = torch.rand(rows, vocab, generator=generator) < excluded
        out[:, 0] = False  # keeps a distribution
        return x.masked_fill(out, -math.inf)

    logits, teacher, upstream = side().requires_grad_(), side(), torch.rand(rows, generator=generator) + 0.5
    value = form(name, temperature=temperature)(logits, teacher)
    options = FORMS[name] | {"temperature": temperature}
    arrays = logits.detach().double().numpy(), teacher.double().numpy()
    expected = getattr(reference, name)(*arrays, **options)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # a mass below the range of float32 is 0 there, so rows with one are not compared
    masses = [np.stack([distribution(r, temperature) for r in x]) if rows else x for x in arrays]
    representable = ~((masses[0] > 0) & (masses[0] < 1e-37) | (masses[1] > 0) & (masses[1] < 1e-37)).any(-1)
    of_value, of_gradient = (4 * torch.finfo(value.dtype).eps * x for x in sizes(name, *arrays, temperature))
    shown = value.detach().double().numpy()
    with np.errstate(invalid="ignore"):  # of infinities in the same places
        close = (shown == expected) | (np.abs(shown - expected) <= of_value)
    assert close[representable].all(), f"{value} is not {expected} to {of_value}"
    finite = representable & np.isfinite(expected)
    found = gradient(value, logits, upstream.to(value.dtype))
    assert found.dtype == dtype
    factor = upstream.to(value.dtype).double().numpy()
    finite_factor = np.where(finite, factor, 0)
    with np.errstate(invalid="ignore"):
        exact = getattr(reference, f"{name}_grad")(*arrays, **options, upstream=finite_factor)
    rounding = 0.501 * torch.finfo(dtype).eps  # to the dtype of the logits
    atol = factor[:, None] / temperature * of_gradient
    close = np.isclose(found.double().numpy(), exact, rtol=rounding, atol=atol)
    assert close[finite].all(), f"{found} is not {exact} to {atol}"


@every_form
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_garbage_stays_in_its_row_and_leaves_no_trace_under_a_mask(name, garbage, side):
    logits, teacher = normal(4, V), normal(4, V, seed=1)
    mask = torch.tensor([True, False, True, True])
    clean = logits.clone().requires_grad_()
    expected = form(name)(clean, teacher)
    logits, teacher = logits.clone(), teacher.clone()
    (logits if side == "student" else teacher)[1, 3] = garbage
    leaf = logits.clone().requires_grad_()
    value = form(name)(leaf, teacher)
    assert value[1].isnan()
    assert torch.equal(value[mask], expected[mask])
    assert gradient(value, leaf)[1].isnan().all()
    loss = kdloss.token_mean(form(name)(leaf, teacher), loss_mask=mask)
    assert torch.equal(gradient(loss, leaf), gradient(kdloss.token_mean(expected, loss_mask=mask), clean))


def test_a_row_of_excluded_tokens_only_is_nan():
    logits = normal(2, V)
    logits[0] = -math.inf
    for name in FORMS:
        assert form(name)(logits, normal(2, V, seed=1)).isnan().tolist() == [True, False]
        assert form(name)(normal(2, V), logits).isnan().tolist() == [True, False]


# Memory layout


@every_form
def test_padding_of_either_side_is_ignored(name):
    """A small 151936 against 152064: columns past `vocab_size` may hold anything and get a gradient of exactly 0."""
    logits, teacher = normal(3, V).requires_grad_(), normal(3, V, seed=1)
    padded = torch.cat([logits.detach(), torch.full((3, 2), math.nan, dtype=torch.float64)], -1).requires_grad_()
    value = form(name, vocab_size=V)(padded, torch.cat([teacher, torch.full((3, 5), 50.0, dtype=torch.float64)], -1))
    expected = form(name)(logits, teacher)
    assert torch.equal(value, expected)
    found = gradient(value, padded)
    assert torch.equal(found[:, :V], gradient(expected, logits))
    assert not found[:, V:].any()


@every_form
def test_strides_do_not_matter(name):
    logits, teacher = normal(4, 6, V), normal(4, 6, V, seed=1)
    expected_leaf = logits.clone().requires_grad_()
    expected = form(name)(expected_leaf, teacher)
    exact = gradient(expected, expected_leaf)
    wide = torch.zeros(4, 8, V + 3, dtype=torch.float64)
    wide[:, 1:7, 2:-1] = logits
    for view in (wide[:, 1:7, 2:-1], logits.transpose(0, 1).contiguous().transpose(0, 1), logits.mT.contiguous().mT):
        leaf = view.detach().requires_grad_()
        value = form(name)(leaf, teacher.flip(0).flip(0))
        # not bit for bit: a row's last elements may go through scalar code, and which are last depends on the block
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-16)
        torch.testing.assert_close(gradient(value, leaf), exact, rtol=1e-13, atol=1e-16)
    # one teacher row for all, as `expand` makes it
    shared = form(name)(logits, teacher[:1, :1].expand(4, 6, V))
    torch.testing.assert_close(shared[2, 3], form(name)(logits[2, 3], teacher[0, 0]), rtol=1e-14, atol=1e-16)


@every_form
def test_many_blocks_are_one_row_after_the_other(name):
    """3001 columns: 34 rows per block, so three blocks and a part of one."""
    logits, teacher = normal(110, 3001, dtype=torch.float32), normal(110, 3001, seed=1, dtype=torch.float32)
    upstream = normal(110, seed=2, dtype=torch.float32)
    upstream[40:80] = 0  # includes a block without a gradient
    leaf = logits.clone().requires_grad_()
    value = form(name, temperature=2.0)(leaf, teacher)
    found = gradient(value, leaf, upstream)
    for t in (0, 33, 34, 50, 68, 109):
        row = logits[t : t + 1].clone().requires_grad_()
        alone = form(name, temperature=2.0)(row, teacher[t : t + 1])
        torch.testing.assert_close(value[t : t + 1], alone, rtol=1e-6, atol=0)
        exact = gradient(alone, row, upstream[t : t + 1])
        torch.testing.assert_close(found[t : t + 1], exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


@every_form
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_the_float32_computation_of_the_same_numbers(name, dtype):
    logits, teacher = normal(5, 50, dtype=dtype, scale=3), normal(5, 50, seed=1, dtype=dtype, scale=3)
    half, wide = logits.clone().requires_grad_(), logits.float().requires_grad_()
    value, expected = form(name)(half, teacher), form(name)(wide, teacher.float())
    assert torch.equal(value, expected)
    assert torch.equal(gradient(value, half), gradient(expected, wide).to(dtype))
    # with different dtypes, each side is widened separately
    assert torch.equal(form(name)(half, teacher.float()), expected)
    assert form(name)(half, teacher.double()).dtype == torch.float64


@every_form
# logits of a fresh model, of a trained one, and far off centre
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (5.0, 0.0), (3.0, 500.0)])
def test_no_more_error_than_torch_itself(name, scale, offset):
    """Compared with the same formula in float32, by `log_softmax` and `logaddexp`."""
    logits = (normal(16, 4001, scale=scale) + offset).float()
    teacher = (normal(16, 4001, seed=1, scale=scale) + offset).float()
    truth_leaf, torch_leaf, leaf = (x.clone().requires_grad_() for x in (logits.double(), logits, logits))
    truth = textbook(name, truth_leaf, teacher.double())
    value = form(name)(leaf, teacher)
    by_torch = in_logs(name, torch_leaf, teacher)
    # twice, because there are few rows and errors vary by chance; the last term is one rounding of the result
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * (by_torch.double() - truth).abs().max() + eps * truth.abs().max()
    assert (value.double() - truth).abs().max() <= allowed
    exact = gradient(truth, truth_leaf)
    allowed = 2 * (gradient(by_torch, torch_leaf).double() - exact).abs().max() + eps * exact.abs().max()
    assert (gradient(value, leaf).double() - exact).abs().max() <= allowed


def in_logs(name: str, logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q, log_p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    (share,) = FORMS[name].values() or (0.5,)
    omega = 1 - share if name == "skewed_reverse_kl" else share
    log_m = torch.logaddexp(log_p + math.log(omega), log_q + math.log1p(-omega))
    of_teacher, of_student = (
        (log_a.exp() * (log_a - (log_b if name in ("forward_kl", "reverse_kl") else log_m))).sum(-1)
        for log_a, log_b in ((log_p, log_q), (log_q, log_p))
    )
    if name == "generalized_jsd":
        return omega * of_teacher + (1 - omega) * of_student
    return of_teacher if "forward" in name else of_student
