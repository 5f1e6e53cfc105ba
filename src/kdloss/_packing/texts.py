"""Argument texts of packed sequences, for docstrings."""

PACKING_ARGS = {
    "cu_seqlens": """(B + 1,) cumulative lengths, int32 or int64, from 0 to T: sequence b has the tokens
        cu_seqlens[b] .. cu_seqlens[b + 1] - 1.""",
    "lengths": "(B,) tokens of each sequence, int32 or int64, each 0 .. L.",
    "total_tokens": """T, a Python integer, so that the shape of the result needs no device sync. None: read from the
        other arguments, which must be on the CPU and outside `torch.compile`.""",
    "loss_mask": """(T,) bool, True at trained tokens. Values at other tokens, NaN included, reach neither the result
        nor a gradient.""",
    "group": """the ranks that each hold a part of every sequence, cut anywhere. Each rank passes its own part, with the
        `cu_seqlens` of that part: T differs by rank, and is 0 on a rank without tokens; B is the same on all. None:
        sequences are whole.""",
}
