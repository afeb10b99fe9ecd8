"""What a rollout takes of memory, said before it starts.

Everything is allocated before the first token is drawn, so a rollout that starts does not die of
memory on its way.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rlir.errors import InputError

_SHARE = 0.8
"""Of the memory that is available, without a limit of the caller's."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use."""

    weights: int
    """Packed weights, embeddings, the rotary table."""
    prompt: int
    """Keys and values of a group's prompt, stored once a group."""
    rollout: int
    """Keys and values of a rollout's own tokens."""
    workspace: int
    """Activations and logits of all groups that roll at once."""
    results: int
    """What is returned."""
    group_size: int
    groups: int
    """Groups that roll at once."""

    @property
    def group(self) -> int:
        """Keys and values of a group."""
        return self.prompt + self.group_size * self.rollout

    @property
    def total(self) -> int:
        return self.weights + self.groups * self.group + self.workspace + self.results

    def __str__(self) -> str:
        return (
            f"{readable(self.total)}: weights {readable(self.weights)}, {self.groups} groups of "
            f"{readable(self.group)} (prompt {readable(self.prompt)}, {self.group_size} x "
            f"{readable(self.rollout)}), workspace {readable(self.workspace)}, "
            f"results {readable(self.results)}"
        )


def readable(count: int) -> str:
    """Bytes for people."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def available() -> int | None:
    """Bytes that the system can still give; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def limit_of(max_bytes: int | None, held: int) -> int | None:
    """The limit of a rollout: the caller's, or a share of what the system has left beside ``held``
    bytes that are allocated already. None: unknown."""
    if max_bytes is not None:
        return max_bytes
    free = available()
    return None if free is None else held + int(_SHARE * free)


def fit(
    one: MemoryPlan, workspace: Callable[[int], int], most: int, limit: int | None
) -> MemoryPlan:
    """As many groups as the limit has room for, ``most`` at most. ``one`` is the plan of a single
    group without its workspace; ``workspace`` says what a number of groups takes.

    Raises:
        InputError: not even one fits; the line has the numbers.
    """
    plan = replace(one, workspace=workspace(1))
    if limit is not None and plan.total > limit:
        raise InputError(
            f"rollout: one group must fit max_bytes, {readable(limit)}, and takes {plan}"
        )
    for groups in range(2, most + 1):
        more = replace(one, workspace=workspace(groups), groups=groups)
        if limit is not None and more.total > limit:
            break
        plan = more
    return plan
