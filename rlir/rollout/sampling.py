"""How a token is drawn from its logits."""

import math
from dataclasses import dataclass

from rlir.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Options of ``rlir.ops.sample_tokens``, which has the formulas.

    With ``top_k``, ``top_p`` or ``min_p`` the log-probability is that of the truncated
    distribution, and the support that was drawn from is kept, so that a later policy is scored on
    the same one.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy (the log-probability is then that of the untempered
    model)."""
    top_k: int | None = None
    """Only the k largest logits."""
    top_p: float | None = None
    """Only the most likely tokens that together have this probability."""
    min_p: float | None = None
    """Only tokens with at least this share of the most likely one's probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"rollout: temperature must be finite and >= 0, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"rollout: top_k must be >= 1 or None, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"rollout: {name} must be in (0, 1] or None, got {value}")

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out, so that a support is kept."""
        some = self.top_p is not None and self.top_p < 1
        return self.top_k is not None or some or self.min_p is not None


def greedy() -> Sampling:
    """The most likely token."""
    return Sampling(temperature=0.0)
