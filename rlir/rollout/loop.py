"""Group rollouts: every prompt continued ``group_size`` times under one action sequence.

Plain PyTorch, and the reference of ``rlir.rollout.engine``, which is what rolls out: the prompt is
prefilled once a group and its keys and values are copied to the members; the cache is allocated
once for the longest stream; the code at stream position n is drawn by ``sample_tokens`` with
(seed, offset n, row id), and its log-probability is kept.

Legend: P prompts, G group size, L frames with the prompt, S visual tokens, A action tokens.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlir.errors import InputError
from rlir.models.world_model import Layer, WorldModel
from rlir.ops import sample_tokens
from rlir.tracing import span


@dataclass(frozen=True)
class Rollouts:
    """What a world model drew.

    ``codes`` int64 [P * G, L, S], the prompt first; ``logprob`` float32 [P * G, L - 1, S] of each
    sampled token; ``entropy`` float32 [L - 1, S], mean over rollouts, in nats.
    """

    codes: Tensor
    logprob: Tensor
    entropy: Tensor


class Cache:
    """One layer of all rollouts: keys [B * Hkv, d, positions], values [B * Hkv, positions, d].

    Rollout and head are one dimension and keys stand transposed, so that a slice of positions is
    a batched product's operand as it is, without a copy (three times as fast).
    """

    def __init__(self, batch: int, heads: int, positions: int, dim: int, dtype: torch.dtype):
        self.k = torch.empty(batch * heads, dim, positions, dtype=dtype)
        self.v = torch.empty(batch * heads, positions, dim, dtype=dtype)


def inference_copy(model: WorldModel, dtype: torch.dtype = torch.bfloat16) -> WorldModel:
    """The policy that rolls out: the model's weights rounded to ``dtype``, without gradients."""
    out = copy.deepcopy(model).to(dtype).eval()
    out.rotary = model.rotary
    return out.requires_grad_(False)


def _members(part: Tensor, prompts: int, group_size: int) -> Tensor:
    """A prompt's keys or values for each member of its group: [P * Hkv, ...] to [B * Hkv, ...]."""
    return part.unflatten(0, (prompts, -1)).repeat_interleave(group_size, 0).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last queries, q [B, H, T, d], over the cached keys [B * Hkv, d, end]
    and values [B * Hkv, end, d].

    Batched products: torch's CPU flash attention pads one query to a block of 32 (20x slower).
    """
    b, heads, t, dim = q.shape
    end, shared = k.shape[2], q.reshape(k.shape[0], -1, dim)  # queries that share a key head
    scores = torch.bmm(shared, k).float().mul_(dim**-0.5)
    if t > 1:
        future = torch.ones(t, end, dtype=torch.bool).triu_(end - t + 1)
        scores = scores.unflatten(1, (-1, t)).masked_fill_(future, -torch.inf).flatten(1, 2)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(b, heads, t, dim)


def _layer(layer: Layer, x: Tensor, table: Tensor, cache: Cache, start: int) -> Tensor:
    attention = layer.self_attn
    q, k, v = (part.transpose(1, 2) for part in attention.project(layer.input_layernorm(x), table))
    end = start + x.shape[1]
    cache.k[:, :, start:end] = k.flatten(0, 1).transpose(1, 2)
    cache.v[:, start:end] = v.flatten(0, 1)
    out = _attend(q, cache.k[:, :, :end], cache.v[:, :end])
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(x)


def _forward(model: WorldModel, x: Tensor, caches: list[Cache], start: int) -> Tensor:
    table = model.rotary[:, start : start + x.shape[1]]
    for layer, cache in zip(model.decoder_layers(), caches, strict=True):
        x = _layer(layer, x, table, cache, start)
    return x


@dataclass(frozen=True)
class RolloutOptions:
    """How prompts are continued: the options of ``rollout``."""

    group_size: int
    temperature: float
    seed: int
    row_ids: Tensor | None


def check_rollout(
    policy: WorldModel, prompts: Tensor, actions: Tensor, options: RolloutOptions
) -> None:
    """Refuses what cannot be rolled out."""
    group_size, temperature = options.group_size, options.temperature
    seed, row_ids = options.seed, options.row_ids
    config = policy.config
    if group_size < 1 or not 0 <= temperature < math.inf:
        raise InputError(
            f"rollout: group_size must be >= 1 and temperature >= 0, "
            f"got {group_size} and {temperature}"
        )
    for name, x, dims in (("prompts", prompts, 2), ("actions", actions, 3)):
        if x.dim() != dims or x.dtype != torch.int64 or x.device.type != "cpu":
            raise InputError(
                f"rollout: {name} must be int64 of {dims} dimensions on the CPU, "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )
    p, s = prompts.shape
    length = actions.shape[1] + 1
    if s != config.tokens or length > config.frames:
        raise InputError(
            f"rollout: prompts must have {config.tokens} tokens and clips at most "
            f"{config.frames} frames, got {s} and {length}"
        )
    if len(actions) != p:
        raise InputError(
            f"rollout: prompts must each have an action sequence, got {p} and {len(actions)}"
        )
    if p and not 0 <= int(prompts.min()) <= int(prompts.max()) < config.codes:
        raise InputError(
            f"rollout: codes must be from 0 and below {config.codes}, "
            f"got {int(prompts.min())} to {int(prompts.max())}"
        )
    if not 0 <= seed < 2**63:
        raise InputError(f"rollout: seed must be from 0 and below 2^63, got {seed}")
    if row_ids is not None and (row_ids.dtype != torch.int64 or row_ids.shape != (p * group_size,)):
        raise InputError(
            f"rollout: row_ids must be int64 [{p * group_size}], "
            f"got {row_ids.dtype} of shape {tuple(row_ids.shape)}"
        )


def row_numbers(rollouts: int, row_ids: Tensor | None) -> Tensor:
    """Who each rollout is: ``row_ids``, or 0, 1, ... ."""
    return torch.arange(rollouts) if row_ids is None else row_ids.contiguous()


def rollout(
    policy: WorldModel,
    prompts: Tensor,
    actions: Tensor,
    *,
    group_size: int = 1,
    temperature: float = 1.0,
    seed: int,
    row_ids: Tensor | None = None,
) -> Rollouts:
    """Continue each prompt ``group_size`` times.

    prompts: codes int64 [P, S]; actions: classes int64 [P, L - 1, F]; row_ids int64 [P * G]: who
    a rollout is, 0, 1, ... if None. Rows of the result are grouped: prompt p's members are rows
    p * G .. (p + 1) * G. ``temperature`` 0 is greedy (the log-probability is then that of the
    untempered model).
    """
    options = RolloutOptions(group_size, temperature, seed, row_ids)
    check_rollout(policy, prompts, actions, options)
    config = policy.config
    p, s = prompts.shape
    length, b = actions.shape[1] + 1, prompts.shape[0] * group_size
    with span("rollout", b), torch.inference_mode():
        blocks = policy.action_ids(actions)
        dtype = policy.lm_head.weight.dtype
        dim = config.hidden // config.heads
        shape = (config.kv_heads, s + (length - 1) * config.block, dim, dtype)
        once = [Cache(p, config.kv_heads, s, dim, dtype) for _ in policy.layers]
        caches = [Cache(b, *shape) for _ in policy.layers]
        with span("rollout.prefill", p * s):
            _forward(policy, policy.embed(prompts, 0), once, 0)
            for single, cache in zip(once, caches, strict=True):
                cache.k[:, :, :s] = _members(single.k, p, group_size)
                cache.v[:, :s] = _members(single.v, p, group_size)
        blocks = blocks.repeat_interleave(group_size, 0)
        codes = torch.empty(b, length, s, dtype=torch.int64)
        codes[:, 0] = prompts.repeat_interleave(group_size, 0)
        logprob = torch.empty(b, length - 1, s)
        entropy = torch.empty(length - 1, s)
        draw = Draw(temperature, seed, row_numbers(b, row_ids))
        for t in range(1, length):
            with span("rollout.frame", b * s):
                _frame(policy, caches, codes, blocks, logprob, entropy, t, draw)
    # Copied outside of inference mode: autograd takes no tensor that was made in it.
    return Rollouts(codes.clone(), logprob.clone(), entropy.clone())


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn."""

    temperature: float
    seed: int
    row_ids: Tensor

    def __call__(self, logits: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token, log-probability and entropy [B] of logits float32 [B, V] of a stream position."""
        if self.temperature:
            token, logprob, entropy = sample_tokens(
                logits,
                temperature=self.temperature,
                seed=self.seed,
                offset=position,
                row_ids=self.row_ids,
            )
            return token, logprob, entropy
        distribution = logits.log_softmax(-1)
        token = distribution.argmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        return token, distribution.gather(1, token[:, None])[:, 0], entropy


def _frame(
    policy: WorldModel,
    caches: list[Cache],
    codes: Tensor,
    blocks: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    t: int,
    draw: Draw,
) -> None:
    """Sample frame t of every rollout in place."""
    config = policy.config
    s = config.tokens
    start = s + (t - 1) * config.block
    stem = policy.stem(codes[:, t - 1], blocks[:, t - 1])
    # The previous frame's last token is in no cache yet: it goes in with the action block.
    ids = blocks[:, t - 1] + config.codes
    x = policy.embed(ids, start)
    for i in range(s):
        if i == 0:
            x[:, -1] += stem[:, 0]
        else:
            x = policy.embed(codes[:, t, i - 1 : i], start) + stem[:, i : i + 1]
        x = _forward(policy, x, caches, start)
        start += x.shape[1]
        logits = policy.lm_head(policy.norm(x[:, -1])).float()
        token, logprob[:, t - 1, i], each = draw(logits, start)
        codes[:, t, i] = token
        entropy[t - 1, i] = each.mean()
    if t + 1 < codes.shape[1]:  # the last token's keys and values, for the frames to come
        _forward(policy, policy.embed(codes[:, t, s - 1 :], start), caches, start)
