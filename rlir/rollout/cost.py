"""What a rollout costs: floating-point operations, bytes that must move, bytes of memory.

A model of the engine's work (``rlir.rollout.engine``), held against measurements by
``benchmarks/bench_rollout.py`` and used for predictions in docs/rollout.md.

Per token: 2 W operations of products (W weights of the layers), 2 D V for a draw, and 4 D a slot
seen and layer of attention (scores and values). Per step: all weights once, a group's prompt once a
group, a rollout's own slots once a rollout; activations stay in the caches of the device.

Legend: C frames of context, G group size, P groups, S visual tokens, A action tokens, D hidden
size, V codes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from rlir.models.world_model import WorldModelConfig
from rlir.rollout.schedule import Plan


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one pass through the model."""

    products: float
    """Floating-point operations of products with weights."""
    attention: float
    """Floating-point operations of scores and values."""
    moved: float
    """Bytes that have to come from memory."""

    @property
    def flops(self) -> float:
        return self.products + self.attention

    def seconds(self, flops_a_second: float, bytes_a_second: float) -> float:
        """The least time: arithmetic and memory at the same time, neither waiting."""
        return max(self.flops / flops_a_second, self.moved / bytes_a_second)


def layer_weights(config: WorldModelConfig) -> int:
    """Weights of the products of all layers."""
    dim = config.hidden // config.heads
    qkv = config.hidden * (config.heads + 2 * config.kv_heads) * dim
    return config.layers * (qkv + config.hidden**2 + 3 * config.hidden * config.mlp)


def stem_weights(config: WorldModelConfig) -> int:
    """Multiplications a visual token of the stem."""
    c = config.stem_channels
    if c == 0:
        return 0
    return 27 * 64 * c + config.stem_blocks * 15 * c * c + c * config.hidden


def slot_bytes(config: WorldModelConfig, item: int = 2) -> int:
    """Keys and values of a token in all layers, ``item`` bytes a number."""
    return 2 * config.layers * config.kv_heads * (config.hidden // config.heads) * item


def prefill(config: WorldModelConfig, context: int, item: int = 2) -> Cost:
    """A prompt of ``context`` frames."""
    tokens = config.tokens + (context - 1) * config.block
    weights = layer_weights(config)
    seen = tokens * (tokens + 1) / 2
    return Cost(
        2.0 * tokens * weights + 2.0 * (context - 1) * config.tokens * stem_weights(config),
        4.0 * config.layers * config.hidden * seen,
        float(item * weights + tokens * slot_bytes(config, item)),
    )


def steps(
    config: WorldModelConfig,
    plan: Plan,
    *,
    groups: int,
    group_size: int,
    context: int,
    frame: int,
    item: int = 2,
) -> list[Cost]:
    """The steps of a frame of groups that all go through it together.

    Args:
        frame: which, ``context`` for the first that is drawn.
    """
    block = config.block - config.tokens + plan.slots
    prompt = plan.slots + (context - 1) * block
    before = plan.slots + (frame - 1) * block - prompt  # own slots when the frame begins
    rollouts = groups * group_size
    head = config.hidden * config.codes
    weights = layer_weights(config)

    def step(fed: int, drawn: int, done: int) -> Cost:
        own = before + done + fed
        return Cost(
            rollouts * (2.0 * fed * weights + 2.0 * drawn * (head + stem_weights(config))),
            rollouts * 4.0 * fed * config.layers * config.hidden * (prompt + own),
            float(
                item * (weights + (head if drawn else 0))
                + slot_bytes(config, item) * (groups * prompt + rollouts * own)
            ),
        )

    left = 1 if frame > context else 0
    action = config.block - config.tokens
    out, done = [step(action + left, 1, 0)], action
    for _, feeds in groupby(plan.feeds, lambda feed: feed.step):
        together = list(feeds)
        out.append(step(len(together), sum(x.predicts >= 0 for x in together), done))
        done += len(together)
    return out


def seconds_of(costs: Iterable[Cost], flops_a_second: float, bytes_a_second: float) -> float:
    """The least time of passes one after the other."""
    return sum(cost.seconds(flops_a_second, bytes_a_second) for cost in costs)
