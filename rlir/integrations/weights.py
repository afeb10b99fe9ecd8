"""Corrections that other trainers hand over as weights of tokens."""

from torch import Tensor

_SMALLEST = 1e-30


def weighted(advantages: Tensor, weight: Tensor) -> Tensor:
    """Advantages times weights >= 0, which is what weights of the policy's loss come to.

    The loss is linear in the advantage, and whether a token is clipped depends on the sign: a
    weight of 0 becomes one that keeps it and is 0 to rounding.
    """
    return advantages * weight.clamp(min=_SMALLEST)
