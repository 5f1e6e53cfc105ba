"""GPU kernels. Nothing here is imported before a kernel is launched, and triton is imported nowhere else.

    _row_math.py         what the kernels share: a logit and its softcap, the state of a row, 64-bit offsets
    _launch.py           blocks, warps and splits by shape
    _logits_forward.py   logits to log-probs and entropies
    _logits_backward.py  and the gradient of the logits

Beside each kernel stands the same algorithm in torch, which the tests compare it with.
"""
