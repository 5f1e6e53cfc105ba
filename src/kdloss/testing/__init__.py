"""Tools to test losses with, the library's own or yours: oracles, expected gradients by enumeration, an auditor.

`reference` holds NumPy float64 oracles of every public function. `SequenceTree` is a language so small that every
sequence can be listed with its probability, `expected_gradient` is the exact expected gradient of any loss on it, and
`audit` says which known objectives that is. `kdloss.testing.strategies`, for users of hypothesis, is imported by name.
Nothing else is needed beyond the library's own dependencies.
"""

from kdloss.testing._audit.audit import audit as audit
from kdloss.testing._audit.report import Audit as Audit, Fit as Fit

from . import reference as reference
from ._expected_gradient import expected_gradient as expected_gradient
from ._sequence_tree import SequenceTree as SequenceTree, TokenBatch as TokenBatch

__all__ = ["Audit", "Fit", "SequenceTree", "TokenBatch", "audit", "expected_gradient", "reference"]
