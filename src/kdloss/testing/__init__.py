"""Tools for testing losses, the library's own or yours: oracles, exact expected gradients, an auditor.

`reference` has NumPy float64 oracles of every public function. `SequenceTree` is a language so small that every
sequence can be listed with its probability. `expected_gradient` computes the exact expected gradient of any loss on it,
`audit` names the known objectives that this gradient consists of, and `compare` prints several losses side by side.
`kdloss.testing.strategies` has strategies for hypothesis; import it by name. The rest needs only the library's own
dependencies.
"""

from kdloss.testing._audit.audit import audit as audit
from kdloss.testing._audit.compare import Comparison as Comparison, compare as compare
from kdloss.testing._audit.report import Audit as Audit, Fit as Fit

from . import reference as reference
from ._expected_gradient import expected_gradient as expected_gradient
from ._sequence_tree import SequenceTree as SequenceTree, TokenBatch as TokenBatch

__all__ = [
    "Audit",
    "Comparison",
    "Fit",
    "SequenceTree",
    "TokenBatch",
    "audit",
    "compare",
    "expected_gradient",
    "reference",
]
