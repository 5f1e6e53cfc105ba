"""A user's per-token loss inside `fused_linear_loss`: what it returns is checked, and differentiated on the spot.

Only log-probs and entropies are differentiated, in eager mode and under a compiler alike. So a tensor that the loss
captures gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks

TokenLoss = Callable[..., Tensor]

_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # new in torch 2.7; bool() is False

_COUPLED = (
    "token_loss must be elementwise, but the loss of one token, or its gradient, moved with {others} ({{}} became "
    "{{}}). A loss on whole sequences (a sequence-level ratio, a discount, a mean) needs linear_token_logprobs first, "
    "then the loss; or pass what is sequence-level as a detached token input"
)
_STOCHASTIC = (
    "token_loss must be deterministic, but of two calls with the same inputs one gives {} and the other {}. Draw "
    "random numbers before, and pass them as a token input"
)


class UserLoss(NamedTuple):
    """`token_loss(logp, entropy, *inputs)` for n of `total` tokens."""

    token_loss: TokenLoss
    inputs: list[Tensor | None]  # (n, ...) each, 0-dim, or None; detached
    total: int

    def at(self, rows: Tensor | slice) -> UserLoss:
        """The loss for some of the tokens."""
        return self._replace(inputs=[x if x is None or x.ndim == 0 else x[rows] for x in self.inputs])

    def attached(self, logp: Tensor, entropy: Tensor) -> Tensor:
        """The losses (n,) as part of the graph of `logp` and `entropy`, where these have one."""
        # inside vmap a tensor does not tell whether it requires a gradient
        if not (logp.requires_grad or (_checks.inside_torch_func() and torch.is_grad_enabled())):
            with torch.no_grad():
                return self._losses(logp, entropy)
        if _is_exporting():  # an exported program records no gradient, so it has no part of the loss that is detached
            return self._losses(logp, entropy)
        found = self.slopes(logp.detach(), entropy.detach(), torch.ones_like(logp))
        return _WithSlopes.apply(logp, entropy, *found)  # type: ignore[no-any-return, no-untyped-call]

    def slopes(self, logp: Tensor, entropy: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The losses (n,), and the gradients (n,) of log-probs and entropies under `upstream` (n,); all detached."""
        if not _checks.runs_eagerly(logp):  # a compiler traces the gradient only through torch.func
            found, pull = torch.func.vjp(self._losses, logp, entropy)  # type: ignore[misc]
            of_logp, of_entropy = pull(upstream.to(found.dtype))
            return found.detach(), of_logp.detach(), of_entropy.detach()
        leaves = [x.detach().requires_grad_() for x in (logp, entropy)]
        # The caller's hooks, of checkpointing or offloading, are for its own graph. This one is gone at once.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            # clones, because torch refuses an in-place change of a leaf in words of its own
            losses = self._losses(leaves[0].clone(), leaves[1].clone())
            if not losses.requires_grad:
                return losses, torch.zeros_like(logp), torch.zeros_like(entropy)
            # `grad_outputs` would import sympy
            slopes = torch.autograd.grad((losses * upstream).sum(), leaves, materialize_grads=True)
        return losses.detach(), slopes[0], slopes[1]

    def check_elementwise(self, logp: Tensor, entropy: Tensor) -> None:
        """Raise unless two calls agree, and the loss of each token depends on that token alone.

        Each half of the tokens, and all but the last, are computed without the others: losses and slopes must stay.
        Then all tokens but one are moved, below and above all others: what depends on a mean or a rank moves too.
        """
        if len(logp) == 0:
            return
        random = torch.get_rng_state()
        losses = self._losses(logp, entropy)
        # irregular, and larger in one half: a gradient that is spread over all tokens, or given to another one, shows
        place = torch.arange(len(logp), device=logp.device)
        weights = 1 + place % 2 + place.to(logp.dtype).mul(0.618).frac()
        whole = self.slopes(logp, entropy, weights)
        _check_same(losses, whole[0], _STOCHASTIC)
        if not torch.equal(torch.get_rng_state(), random):
            raise ValueError(_STOCHASTIC.format("a loss", "may give another"))
        for some in (slice(None, None, 2), slice(1, None, 2), slice(None, -1)):
            alone = self.at(some).slopes(logp[some], entropy[some], weights[some])
            for expected, found in zip(whole, alone, strict=True):
                _check_same(expected[some], found, _COUPLED.format(others="the number or the gradient of others"))
        for row in (0, -1):
            for low in (True, False):
                moved = [torch.full_like(x, _beyond(x, low)) for x in (logp, entropy)]
                for x, kept in zip(moved, (logp, entropy), strict=True):
                    x[row] = kept[row]
                found = self._losses(moved[0], moved[1])
                _check_same(losses[row], found[row], _COUPLED.format(others="the log-probs or entropies of others"))

    def _losses(self, logp: Tensor, entropy: Tensor) -> Tensor:
        """What `token_loss` returns, checked to be (n,)."""
        given = {"its log-probs": logp, "its entropies": entropy}
        given.update({f"token_inputs[{number}]": x for number, x in enumerate(self.inputs) if x is not None})
        versions = [_version(x) for x in given.values()]
        losses = self._called(logp, entropy)
        for (name, x), version in zip(given.items(), versions, strict=True):
            if _version(x) != version:
                raise ValueError(
                    f"token_loss must not change {name} in place; return a new tensor, such as 2 * logp in place of "
                    "logp.mul_(2)"
                )
        if not isinstance(losses, Tensor):
            raise TypeError(f"token_loss must return a tensor, got {type(losses).__name__}")
        if not losses.dtype.is_floating_point:
            raise TypeError(f"token_loss must return losses of a floating-point dtype, got {losses.dtype}")
        if losses.shape != logp.shape:
            raise ValueError(
                f"token_loss must return the loss of each of its {logp.shape[0]} tokens, {tuple(logp.shape)}, "
                f"got {tuple(losses.shape)}; fused_linear_loss reduces them itself"
            )
        return losses

    def _called(self, logp: Tensor, entropy: Tensor) -> Tensor:
        if logp.shape[0] == self.total or torch.compiler.is_compiling():
            return self.token_loss(logp, entropy, *self.inputs)
        try:
            return self.token_loss(logp, entropy, *self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"token_loss is called on some of the tokens at a time, and failed on {logp.shape[0]} of {self.total}: "
                f"{error}. A tensor of all tokens must be a token input; it may not be captured"
            ) from error


class _WithSlopes(torch.autograd.Function):
    """Losses as they are, whose gradient is known: `slope` in log-probs, `entropy_slope` in entropies."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logp: Tensor, entropy: Tensor, losses: Tensor, slope: Tensor, entropy_slope: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # the incoming gradient of an untrained token is 0, and its slope may not be finite
        return *(torch.where(upstream == 0, 0, upstream * x) for x in ctx.saved_tensors), None, None, None


def _unchanged(x: Tensor) -> Tensor:
    return x


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; unknown of inference tensors and to a compiler."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _beyond(x: Tensor, low: bool) -> float:
    """A number below or above all finite values of `x`, and of the same sign: log-probs <= 0, entropies >= 0."""
    finite = x[x.isfinite()]
    if len(finite) == 0:
        return 0.0
    least, most = float(finite.min()), float(finite.max())
    if low:
        return least - 1 if least < 0 else least / 2
    return most / 2 if most < 0 else most + 1


def _check_same(expected: Tensor, found: Tensor, message: str) -> None:
    close = torch.isclose(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if not close.all():
        raise ValueError(message.format(*(f"{float(x[~close].flatten()[0]):.6g}" for x in (expected, found))))
