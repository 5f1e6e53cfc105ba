"""Holds that oracles made by `pair` look and refuse arguments as if each were written out."""

from __future__ import annotations

import inspect
import pickle

import pytest

from kdloss.testing import reference

GRADIENTS = [name for name in reference.__all__ if name.endswith("_grad")]


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_takes_what_its_oracle_takes_and_upstream_gradients(name):
    value, grad = getattr(reference, name.removesuffix("_grad")), getattr(reference, name)
    of_value, of_grad = (inspect.signature(f).parameters for f in (value, grad))
    upstream = [p for p in of_grad.values() if p.name.startswith("upstream")]
    assert all(p.default is p.empty and p.kind is p.KEYWORD_ONLY for p in upstream)
    assert [p for p in of_grad.values() if p not in upstream] == list(of_value.values())
    for f in (value, grad):
        assert f.__doc__
        assert "Gradient:" not in f.__doc__
        assert pickle.loads(pickle.dumps(f)) is f
    assert value.__doc__ != grad.__doc__


def test_a_call_with_the_arguments_of_the_other_is_refused():
    row = [[0.0, 0.0]]
    assert reference.forward_kl(row, row).tolist() == [0.0]
    assert reference.forward_kl_grad(row, row, upstream=[1.0]).tolist() == [[0.0, 0.0]]
    with pytest.raises(TypeError, match="unexpected keyword argument 'upstream'"):
        reference.forward_kl(row, row, upstream=[1.0])
    with pytest.raises(TypeError, match=r"missing a required (keyword-only )?argument: 'upstream'"):
        reference.forward_kl_grad(row, row)
    with pytest.raises(TypeError, match=r"missing a required (keyword-only )?argument: 'loss_mask'"):
        reference.kdrl_loss([0.0], None, [0.0], [0.0])
