"""Holds `kdloss.testing.compare`: numbers known in closed form, and a table that a person can read."""

from __future__ import annotations

import math

import pytest
import torch

import kdloss
from kdloss.testing import SequenceTree, compare


@pytest.fixture(scope="module")
def one_token():
    return SequenceTree(max_length=1, seed=3)


def test_the_numbers_of_one_token_are_those_of_the_closed_form(one_token):
    """The surrogate's gradient at token v is h_v (onehot_v - q), h = log q/p; the forward KL's mean is q - p."""
    report = compare({"k2": kdloss.kl_k2, "k3": kdloss.kl_k3, "exact": kdloss.reverse_kl}, one_token)
    q, p = one_token.student.detach().softmax(-1)[0], one_token.teacher.softmax(-1)[0]
    h = (q / p).log()
    each = h[:, None] * (torch.eye(3) - q)
    mean = q * (h - q @ h)
    variance = (q * each.square().sum(-1)).sum() - mean.square().sum()
    assert report.variances["k2"][0] == pytest.approx(float(variance / mean.square().sum()), rel=1e-12)
    assert report.variances["exact"] == pytest.approx((0, 0), abs=1e-15)
    assert report.cosines["k2"][0] == pytest.approx(1, rel=1e-12)
    assert report.cosines["exact"] == pytest.approx((1, 1), rel=1e-12)
    cosine = torch.cosine_similarity(mean, q - p, 0)
    assert report.cosines["k3"][0] == pytest.approx(float(cosine), rel=1e-12)
    assert report.audits["k3"].on_policy.coefficients == {"forward KL (token)": pytest.approx(1)}


def test_a_person_can_read_it():
    tree = SequenceTree(max_length=2, eos=0)
    losses = {
        "k1": kdloss.kl_k1,
        "k2": kdloss.kl_k2,
        "away": lambda logits, teacher_logits: -kdloss.reverse_kl(logits, teacher_logits),
        "nothing": lambda logp: logp.detach(),
        "clipped": lambda logp, teacher_logp: -(teacher_logp - logp).detach().clamp(-9, 9) * logp,
    }
    report = compare(losses, tree)
    lines = str(report).splitlines()
    assert lines[0].split() == ["loss", "tokens", "from", "descending", "it", "variance", "cosine"]
    assert len(lines) == 2 + 2 * len(losses) + 2
    rows = [" ".join(line.split()) for line in lines]
    assert rows[2] == "k1 the student zero gradient, noise alone inf -"
    assert "k2 the student lowers 1.00 × reverse KL (token)" in rows[4]  # noqa: RUF001
    assert rows[5].startswith("another policy none known; nearest")
    assert rows[6].endswith("-1.00")
    assert rows[8] == "nothing the student zero gradient - -"
    assert "lowers 1.00 × reverse KL (token), on this tree only" in rows[10]  # noqa: RUF001
    assert math.isnan(report.variances["nothing"][0])
    assert max(map(len, lines)) <= 120
    again = str(compare({"k1": kdloss.kl_k1}, tree)).splitlines()
    assert [" ".join(line.split()) for line in again[2:4]] == rows[2:4]


def test_an_ambiguous_reading_is_said_to_be_one_of_several(one_token):
    report = compare({"k2": kdloss.kl_k2}, one_token)
    assert report.audits["k2"].on_policy.ambiguous
    assert "one reading of several" in str(report)


def test_batches_and_teachers_without_a_reverse_kl():
    excluding = SequenceTree(max_length=1)
    excluding.teacher[0, 1] = -math.inf
    report = compare(
        {"jsd": lambda logits, teacher_logits: kdloss.generalized_jsd(logits, teacher_logits, beta=0.5)}, excluding
    )
    assert all(math.isnan(x) for x in report.cosines["jsd"])
    one, two = (compare({"k2": kdloss.kl_k2}, SequenceTree(max_length=1), batch_size=n) for n in (1, 2))
    assert two.variances["k2"][0] == pytest.approx(one.variances["k2"][0] / 2, rel=1e-9)


def test_a_reverse_kl_of_rounding_alone_has_no_cosine():
    """A teacher that is the student up to a constant in its logits."""
    tree = SequenceTree(max_length=2, eos=0)
    tree.teacher = tree.student.detach() + 0.1
    report = compare({"entropy": lambda entropy: -entropy}, tree)
    assert all(math.isnan(x) for x in report.cosines["entropy"])


def test_errors(one_token):
    with pytest.raises(ValueError, match="at least one entry"):
        compare({})
    with pytest.raises(TypeError, match="mine: the loss needs labels_of_mine"):
        compare({"k2": kdloss.kl_k2, "mine": lambda labels_of_mine: labels_of_mine}, one_token)
    with pytest.raises(ValueError, match="short: the loss must return"):
        compare({"short": lambda logp: logp[:-1]}, one_token)
