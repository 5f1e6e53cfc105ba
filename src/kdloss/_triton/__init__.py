"""GPU kernels. Nothing here is imported before a kernel is launched, and no other folder imports triton.

    _row_math.py            what the kernels share: a logit and its softcap, the state of a row, 64-bit offsets
    _launch.py              block sizes, warps and splits for each shape
    _logits_forward.py      logits to log-probs and entropies
    _logits_backward.py     the gradient of those logits
    _topk_forward.py        the logits at kept ids, and the log-sum-exp of the rest
    _topk_backward.py       the gradient of those logits
    _products.py            products with a head, in float32 from half precision, and the slices of the vocabulary
    _slices.py              one slice of logits: folded into log-probs and entropies, or turned into its gradient
    _compaction.py          the rows that take part, gathered from the stream and scattered back
    _linear.py              hidden states to log-probs and entropies, and back
    _divergence_kernels.py  the divergence of rows of two sets of logits, and its gradient
    _divergences.py         launches of those kernels

Every kernel that computes has a counterpart in torch with the same algorithm, which the tests compare it with. Kernels
that only copy (`_compaction.py`) are compared with torch's own operations.
"""
