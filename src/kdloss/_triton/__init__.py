"""GPU kernels. Nothing here is imported before a kernel is launched, and triton is imported nowhere else.

    _row_math.py         what the kernels share: a logit and its softcap, the state of a row, 64-bit offsets
    _launch.py           blocks, warps and splits by shape
    _logits_forward.py   logits to log-probs and entropies
    _logits_backward.py  and the gradient of the logits
    _topk_forward.py     logits at kept ids and the log-sum-exp of the rest
    _topk_backward.py    and the gradient of the logits
    _products.py         products with a head, in float32 from half precision, and its slices
    _slices.py           a slice of logits, folded into log-probs and entropies; and its gradient
    _compaction.py       rows that take part, picked out and put back
    _linear.py           hidden states to log-probs and entropies, and back
    _divergence_kernels.py, _divergences/from_logits.py  the divergence of rows of two sets of logits, and its gradient

Beside each kernel that computes stands the same algorithm in torch, which the tests compare it with; copies
(`_compaction.py`) are compared with torch's own.
"""
