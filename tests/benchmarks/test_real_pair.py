"""Compares benchmarks/real_pair.py with autograd of every outcome, and the page with the stored numbers."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from benchmarks import real_pair
from benchmarks.real_pair import FORMS, KEPT, TAILS, Form, Pair
from benchmarks.report import with_tables

N, V, D = 2, 70, 3  # more tokens than the largest K


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(N, D), normal(V, D)
    logits = 2 * hidden @ weight.T
    return Pair(logits, logits + normal(N, V), torch.tensor([3, 50]), hidden, weight)


def of_every_outcome(form, pair):
    """(N, V, V) the gradient in the logits of each row, for each token y, by autograd through the library."""
    leaf = pair.logits.repeat_interleave(V, 0).requires_grad_()
    loss = real_pair.loss_of(form, leaf, pair.teacher_logits.repeat_interleave(V, 0), torch.arange(V).repeat(N))
    return torch.autograd.grad(loss, leaf)[0].view(N, V, V)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_mean_and_variance_are_those_of_enumeration(form, pair):
    q, each = pair.logits.softmax(-1), of_every_outcome(form, pair)
    gradient = real_pair.gradient_of(form, pair.logits, pair.teacher_logits)
    scores = torch.eye(V, dtype=torch.float64) - q.unsqueeze(1)
    torch.testing.assert_close(gradient.fixed.unsqueeze(1) + gradient.cost.unsqueeze(-1) * scores, each)
    for weight, found in ((None, each), (pair.weight, each @ pair.weight)):
        mean = (q.unsqueeze(-1) * found).sum(1)
        spread = (q * (found - mean.unsqueeze(1)).square().sum(-1)).sum(-1)
        torch.testing.assert_close(real_pair.variance(gradient, q, real_pair.squared_scores(q, weight), weight), spread)
    torch.testing.assert_close(real_pair.expected(gradient, q), (q.unsqueeze(-1) * each).sum(1))


def test_every_number_of_a_row_is_that_of_enumeration(pair):
    q = pair.logits.softmax(-1)
    exact = of_every_outcome(Form("full"), pair)[:, 0]
    plain = []
    for form, row in zip(FORMS, real_pair.measured(pair), strict=True):
        each = of_every_outcome(form, pair)
        mean = (q.unsqueeze(-1) * each).sum(1)
        spread = (q * (each - mean.unsqueeze(1)).square().sum(-1)).sum(-1)
        plain = plain or [spread]  # the first form is a sample without a baseline
        # of the head (V, D): every combination of a token of the first row and one of the second
        first, second = (torch.einsum("yv,d->yvd", each[i], pair.hidden[i]).flatten(1) for i in range(N))
        square = (first.unsqueeze(1) + second).square().sum(-1)
        whole, wanted = (torch.einsum("nv,nd->vd", x, pair.hidden).flatten() for x in (mean, exact))
        expectation = torch.einsum("x,y,xy->", q[0], q[1], square)
        found = {
            "variance": spread.sum() / exact.square().sum(),
            "variance_median": (spread / exact.square().sum(-1)).min(),  # torch's median of two is the smaller
            "louder": (spread > plain[0]).double().mean(),
            "bias": (mean - exact).norm() / exact.norm(),
            "bias_median": ((mean - exact).norm(dim=-1) / exact.norm(dim=-1)).min(),
            "cosine": torch.cosine_similarity(mean.flatten(), exact.flatten(), 0),
            "cosine_head": (whole @ wanted / (expectation.sqrt() * wanted.norm())).nan_to_num(0),  # no gradient
        }
        for name, x in found.items():
            assert row[name] == pytest.approx(x.item(), rel=1e-3, abs=1e-6), (form, name)


def test_the_page_holds_the_stored_numbers():
    result, page = json.loads(real_pair.DATA.read_text("utf-8")), real_pair.PAGE.read_text("utf-8")
    assert with_tables(page, real_pair.tables(result)) == page, "run: python -m benchmarks.real_pair --figure"
    assert [[Form(x["name"], x["k"], x["support"]) for x in level["forms"]] for level in result["levels"]] == [
        list(FORMS)
    ] * len(real_pair.NOISE)


def test_what_the_page_says_of_the_numbers():
    levels = json.loads(real_pair.DATA.read_text("utf-8"))["levels"]
    assert [[x["louder"] for x in level["forms"] if x["name"] == "value"] for level in levels] == [[0.2396], [0.09704]]
    assert [level["forms"][3]["louder"] for level in levels] == [0.5469, 0.3666]  # the teacher's top 1 and a sample
    for level, sooner, later in zip(levels, (30_000, 11_000), (80_000, 19_000), strict=True):
        rows = {Form(x["name"], x["k"], x["support"]): x for x in level["forms"]}
        for k in KEPT:
            for support in ("teacher", "student"):
                bucket = rows[Form("bucket", k, support)]
                assert all(bucket["bias"] <= rows[Form(tail, k, support)]["bias"] for tail in TAILS)
                assert bucket["cosine_head"] > rows[Form("sample", k, support)]["cosine_head"]
            for name in ("sample", *TAILS) if k > 1 else ():
                ours, theirs = rows[Form(name, k, "student")], rows[Form(name, k, "teacher")]
                assert ours["cosine_head"] > theirs["cosine_head"]
                assert ours["variance"] <= theirs["variance"]
                assert ours["bias"] <= theirs["bias"]
        assert rows[Form("truncate", 1, "teacher")]["cosine_head"] < 0
        assert rows[Form("optimal")]["louder"] == 0
        for k, tokens in ((16, sooner), (64, later)):
            noise, bias = (1 / rows[Form(x, k, "teacher")]["cosine_head"] ** 2 - 1 for x in ("sample", "bucket"))
            assert level["positions"] * noise / bias == pytest.approx(tokens, rel=0.05)


def test_what_was_not_expected():
    levels = json.loads(real_pair.DATA.read_text("utf-8"))["levels"]
    found = [{Form(x["name"], x["k"], x["support"]): x for x in level["forms"]} for level in levels]

    def quieter(*form: Any) -> list[float]:  # than a sample without a baseline, in percent
        return [round(100 - 100 * x[Form(*form)]["variance"] / x[Form("sampled")]["variance"]) for x in found]

    assert quieter("sample", 1, "teacher") == [2, 2]
    assert quieter("value") == [11, 25]
    assert found[1][Form("sample", 4, "teacher")]["variance"] > found[1][Form("optimal")]["variance"]
    better = []  # cells where "renormalize" has a larger error than the bucket and a higher cosine
    for level, rows in enumerate(found):
        for k, support in itertools.product(KEPT, ("teacher", "student")):
            bucket, other = rows[Form("bucket", k, support)], rows[Form("renormalize", k, support)]
            assert rows[Form("generalized", k, support)]["bias"] > bucket["bias"] < other["bias"]
            if other["cosine_head"] > bucket["cosine_head"]:
                better.append((level, k, support))
    assert better == [(1, 16, "student"), (1, 64, "student")]
    assert [(round(x["reverse_kl"], 2), round(x["entropy"], 1)) for x in levels] == [(0.11, 2.3), (0.46, 3.3)]
    assert [x["positions"] for x in levels] == [384, 371]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form("sampled"), 4),
        (Form("optimal"), 4 * V),
        (Form("full"), 4 * V),
        (Form("bucket", 16, "teacher"), 128),
        (Form("bucket", 16, "student"), 64),
        (Form("sample", 16, "teacher"), 132),
        (Form("sample", 16, "student"), 68),
    ],
)
def test_bytes_of_float32_values_and_int32_ids(form, expected):
    assert real_pair.bytes_per_token(form, V) == expected


def test_a_run_checks_the_closed_forms_and_finds_a_wrong_one(pair, monkeypatch):
    wide = pair._replace(logits=pair.logits.repeat(1, 2), teacher_logits=pair.teacher_logits.repeat(1, 2))
    assert real_pair.check(wide) < 1e-12
    right = real_pair.gradient_of
    monkeypatch.setattr(real_pair, "gradient_of", lambda *given: right(*given)._replace(fixed=right(*given).cost))
    assert real_pair.check(wide) > 0.1
