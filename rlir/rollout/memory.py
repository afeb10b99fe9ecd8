"""What a rollout takes of memory, said before it starts.

Everything is allocated before the first token is drawn, so a rollout that starts does not die of
memory on its way.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlir.errors import InputError
from rlir.models.world_model import WorldModelConfig
from rlir.rollout.groups import KEYS, Request
from rlir.rollout.schedule import Plan

CHUNK = 16
"""Rollouts that go through the layers together on a thread of their own: csrc/ops."""
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


def capacities(config: WorldModelConfig, request: Request) -> tuple[int, int]:
    """Slots of the longest prompt and of the longest rollout's own cache, which is whole blocks."""
    plan, block = request.plan, config.block - config.tokens + request.plan.slots
    prompt = own = 1
    for group in request.groups:
        given = plan.slots + (group.context - 1) * block
        end = plan.slots + (group.frames - 1) * block
        prompt, own = max(prompt, given), max(own, end - given // KEYS * KEYS)
    if request.window is not None:  # a ring: what is seen, and the frame that is written
        own = min(own, (request.window + 1) * block)
    return prompt, -(-own // KEYS) * KEYS


def rows_a_step(config: WorldModelConfig, plan: Plan) -> int:
    """The most tokens that a rollout feeds in a step."""
    counts = Counter(feed.step for feed in plan.feeds)
    return max([config.block - config.tokens + 1, *counts.values()])


def plan_memory(
    config: WorldModelConfig,
    request: Request,
    sizes_of: Callable[[int, int], list[int]],
    *,
    weights: int,
    item: int,
    has_stem: bool,
    shares_products: Callable[[int], bool],
    limit: int | None,
) -> MemoryPlan:
    """What a rollout of the native engine takes.

    Args:
        sizes_of: the op ``_decoder_sizes`` for (rows, slots).
        weights: bytes.
        item: bytes of a key's number.
        shares_products: whether all threads share products, for a number of rollouts.
    """
    g, dim, heads = request.group_size, config.hidden // config.heads, config.layers
    heads *= config.kv_heads
    prompt, own = capacities(config, request)
    _, _, keys, values, _, _ = sizes_of(1, own)
    _, _, tail_keys, tail_values, _, _ = sizes_of(1, KEYS)
    most = rows_a_step(config, request.plan)
    drawn = len(request.groups) * g * (request.length - 1) * config.tokens
    a_token = 28 + (-(-config.codes // 8) if request.sampling.truncates else 0)
    one = MemoryPlan(
        weights=weights,
        prompt=heads * (2 * prompt * dim * item + 4 * (tail_keys + tail_values)),
        rollout=heads * 4 * (keys + values),
        workspace=0,
        results=2 * drawn * a_token,  # and the copy that is handed out
        group_size=g,
        groups=1,
    )

    def workspace(groups: int) -> int:
        rollouts, threads = groups * g, torch.get_num_threads()
        if shares_products(rollouts):
            together, teams = rollouts, 1
        else:
            together, teams = min(CHUNK, rollouts), threads
        *_, space, task = sizes_of(together * most, own)
        logits = together * (1 if request.plan.raster else most) * config.codes * 4
        stem = rollouts * config.tokens * config.hidden * 4 if has_stem else 0
        return teams * (space + logits) + threads * task + stem

    return fit(one, workspace, len(request.groups), limit)
