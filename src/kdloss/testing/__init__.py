"""Tools to test losses with, the library's own or yours: oracles, and expected gradients by exact enumeration.

`reference` holds NumPy float64 oracles of every public function. `SequenceTree` is a language so small that every
sequence can be listed with its probability, and `expected_gradient` is the exact expected gradient of any loss on it.
Needs nothing beyond the library's own dependencies.
"""

from . import reference as reference
from ._expected_gradient import expected_gradient as expected_gradient
from ._sequence_tree import SequenceTree as SequenceTree
from ._sequence_tree import TokenBatch as TokenBatch

__all__ = ["SequenceTree", "TokenBatch", "expected_gradient", "reference"]
