"""The loop over steps of rollouts that go together: equal context, equal length.

Everything in it is on the device, and its sizes are known from the plan: nothing waits for the
device between the first step and the last (tests/rollout/test_stepping.py holds it to that). On
CUDA a step is a graph: one is captured for each number of tokens that a step feeds and draws, and
replayed with other indices, which are data. Capturing waits for the device, once a graph.

Legend: P prompts, G group size, B = P G rollouts, L frames, S visual tokens, A action tokens,
N slots of a clip (``rlir.rollout.layout``), T tokens that a step feeds, K that it draws, D hidden
size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlir.models.stem import engine_stem
from rlir.models.world_model import Layer, WorldModel
from rlir.ops import (
    group_decode_attention,
    head_logits,
    rotary_append_,
    sample_tokens,
    selected_logprob,
    video_attention,
)
from rlir.rollout.layout import Layout, Step, known_tokens, layout_of
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Plan
from rlir.rollout.trajectories import NOTHING
from rlir.tracing import span

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Of a step that reads and writes memory at fixed addresses: what does it again."""


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step in a CUDA graph. Doing a step twice does no harm."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their workspaces the first time
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@dataclass(frozen=True)
class _Indices:
    """A step, as int64 on the device."""

    slot: Tensor
    token: Tensor
    embed: Tensor
    """[T] each: as in ``Layout``."""
    predicting: Tensor
    place: Tensor
    target: Tensor
    offset: Tensor
    """[K] each: what of the T draws, which place, its index in the known tokens, its number."""

    @staticmethod
    def pack(layout: Layout, step: Step, frame: int) -> np.ndarray:
        """In one row, [3 T + 4 K]."""
        fed = [x[step.slots] for x in (layout.token, layout.embed)]
        target = frame * layout.plan.rows * layout.plan.columns + step.places
        offset = layout.offset(frame, 0) + step.places
        return np.concatenate([step.slots, *fed, step.predicting, step.places, target, offset])

    @classmethod
    def unpack(cls, row: Tensor, feeds: int, draws: int) -> "_Indices":
        """Views of such a row."""
        return cls(*row.split([feeds] * 3 + [draws] * 4))


@dataclass(frozen=True)
class Drawn:
    """Of rollouts of L frames: on the device until ``cpu``."""

    codes: Tensor
    """int64 [B, L, S]."""
    logprob: Tensor
    entropy: Tensor
    """float32 [B, L - 1, S], 0 of frames that were given."""
    fed: Tensor
    """int64 [B, N], ``NOTHING`` where nothing was fed."""
    support: Tensor | None
    """uint8 [B, L - 1, S, ceil(V / 8)]."""

    def cpu(self) -> "Drawn":
        moved: dict[str, Any] = {k: None if x is None else x.cpu() for k, x in vars(self).items()}
        return Drawn(**moved)


class Stepper:
    """Rollouts under way.

    Args:
        policy: what rolls out, rounded, without gradients.
        plan: of a frame.
        sampling: how tokens are drawn.
        codes: int64 [P, C, S]: the context; actions: token blocks int64 [P, L - 1, A].
        group_size: G.
        seed: int64 [1]; row_ids: int64 [B].
        capture: makes a step into what repeats it; None: steps run as they are.
    """

    def __init__(
        self,
        policy: WorldModel,
        plan: Plan,
        sampling: Sampling,
        codes: Tensor,
        actions: Tensor,
        group_size: int,
        seed: Tensor,
        row_ids: Tensor,
        capture: Capture | None = None,
    ):
        self.policy, self.sampling, self.group_size = policy, sampling, group_size
        self.seed, self.row_ids, self.capture = seed, row_ids, capture
        (p, self.context, s), self.frames = codes.shape, actions.shape[1] + 1
        config, a, b, device = policy.config, policy.action_tokens, p * group_size, codes.device
        window = config.frames if self.frames > config.frames else None
        self.mask = plan.mask(a, self.context, window)
        self.layout = layout_of(plan, a, self.frames, self.context)
        n = len(self.layout.token)
        self.prefix = self.layout.image(self.context - 1) + plan.slots
        """Slots of the context."""
        self.blocks = actions.repeat_interleave(group_size, 0)
        later = codes.new_zeros(p, self.frames - self.context, s)
        known = known_tokens(torch.cat([codes, later], 1), actions, config.codes)
        self.known = known.repeat_interleave(group_size, 0)
        self.fed = codes.new_full((b, n), NOTHING)
        self.logprob, self.entropy = (
            torch.zeros(b, self.frames * s, device=device) for _ in range(2)
        )
        self.support = None
        if sampling.truncates:
            size = (b, self.frames * s, -(-config.codes // 8))
            self.support = torch.zeros(size, dtype=torch.uint8, device=device)
        self.stem = torch.zeros(b, s, config.hidden, device=device)
        self.table = policy.rotary_until(self.layout.offset(self.frames - 1, s))
        """cos and sin [2, positions, d]."""
        later = torch.from_numpy(self.layout.position[self.prefix :]).to(device)
        self.own_table = self.table.index_select(1, later)
        """The same of slots after the context: a slot is not a position where diagonals refresh."""
        dtype = policy.lm_head.weight.dtype
        shape = (b, n - self.prefix, config.kv_heads, config.hidden // config.heads)
        self.suffixes = [
            (_empty(shape, dtype, device), _empty(shape, dtype, device)) for _ in policy.layers
        ]
        self.prefixes: list[tuple[Tensor, Tensor]] = []
        self.prefix_lengths = codes.new_full((p,), self.prefix)
        self.suffix_lengths = codes.new_zeros(b)
        self._repeats: dict[tuple[int, int], tuple[Tensor, Callable[[], None]]] = {}
        self._plan = {f: self.layout.steps(f) for f in range(self.context, self.frames)}
        rows = [_Indices.pack(self.layout, x, f) for f, steps in self._plan.items() for x in steps]
        packed = np.concatenate([np.zeros(0, np.int64), *rows])
        self._rows = torch.from_numpy(packed).to(device).split([len(row) for row in rows])

    def run(self) -> None:
        """Prefill the context, once a group, and draw all frames, if there are any to draw."""
        if self._plan:
            with torch.no_grad():
                self._prefill()
                self.draw()

    def draw(self) -> None:
        """Draw the frames after the context."""
        rows = iter(self._rows)
        for frame, steps in self._plan.items():
            with span("rollout.frame", len(self.known) * self.stem.shape[1]):
                self._begin(frame)
                for step in steps:
                    row, sizes = next(rows), (len(step.slots), len(step.places))
                    if self.capture is None:
                        self._step(_Indices.unpack(row, *sizes))
                    else:
                        self._repeat(self.capture, row, sizes)

    def drawn(self) -> Drawn:
        """What has been drawn so far."""
        b, s = len(self.known), self.stem.shape[1]
        logprob, entropy = (
            x.unflatten(1, (self.frames, s))[:, 1:] for x in (self.logprob, self.entropy)
        )
        support = self.support
        if support is not None:
            support = support.unflatten(1, (self.frames, s))[:, 1:]
        codes = self.known[:, : self.frames * s].view(b, self.frames, s)
        return Drawn(codes, logprob, entropy, self.fed, support)

    def _prefill(self) -> None:
        """Keys and values of the context [P, slots, Hkv, d], under the mask that rollouts have."""
        policy, context, layout = self.policy, self.context, self.layout
        device, size = self.known.device, self.prefix
        token, position, slots = (
            torch.from_numpy(x[:size]).to(device)
            for x in (layout.token, layout.position, layout.embed)
        )
        ids = self.known[:: self.group_size].index_select(1, token)
        with span("rollout.prefill", ids.numel()):
            x = policy.embed_at(ids, slots)
            if policy.stem is not None and context > 1:
                s = self.stem.shape[1]
                codes = self.known[:: self.group_size, : context * s].unflatten(1, (context, s))
                blocks = self.blocks[:: self.group_size, : context - 1]
                predicts = torch.from_numpy(layout.predicts[: context - 1].reshape(-1)).to(device)
                stem = policy.stem_output(policy.stem, codes, blocks)
                x = x.index_add(1, predicts, stem.flatten(1, 2))
            table = self.table.index_select(1, position)
            for layer in policy.decoder_layers():
                q, k, v = layer.self_attn.project(layer.input_layernorm(x), table)
                self.prefixes.append((k.contiguous(), v.contiguous()))
                x = _after(layer, x, video_attention(q, k, v, mask=self.mask))
        fed = torch.from_numpy(layout.fed[:size]).to(device)
        self.fed[:, :size] = torch.where(fed, ids, NOTHING).repeat_interleave(self.group_size, 0)

    def _begin(self, frame: int) -> None:
        """What is the same for all steps of a frame."""
        end = self.layout.image(frame) + self.layout.plan.slots
        self.suffix_lengths.fill_(end - self.prefix)
        if self.policy.stem is not None:
            s = self.stem.shape[1]
            previous, block = self.known[:, (frame - 1) * s : frame * s], self.blocks[:, frame - 1]
            dtype = self.policy.lm_head.weight.dtype
            self.stem.copy_(engine_stem(self.policy.stem, previous, block, dtype))

    def _repeat(self, capture: Capture, row: Tensor, sizes: tuple[int, int]) -> None:
        """A step that reads its indices where the first one of its sizes had them."""
        if sizes not in self._repeats:
            fixed = row.clone()
            indices = _Indices.unpack(fixed, *sizes)
            self._repeats[sizes] = fixed, capture(lambda: self._step(indices))
        fixed, repeat = self._repeats[sizes]
        fixed.copy_(row)
        repeat()

    def _step(self, at: _Indices) -> None:
        """Feed T tokens of every rollout, draw K."""
        policy = self.policy
        ids = self.known.index_select(1, at.token)
        self.fed.index_copy_(1, at.slot, ids)
        x = policy.embed_at(ids, at.embed)
        if policy.stem is not None:
            x = x.index_add(1, at.predicting, self.stem.index_select(1, at.place))
        (cos, sin), own = self.own_table, (at.slot - self.prefix).expand(len(ids), -1).contiguous()
        for layer, prefix, suffix in zip(
            policy.decoder_layers(), self.prefixes, self.suffixes, strict=True
        ):
            attention = layer.self_attn
            parts = [attention.heads, attention.kv_heads, attention.kv_heads]
            heads = attention.qkv_proj(layer.input_layernorm(x)).unflatten(-1, (-1, attention.dim))
            q, k, v = heads.split(parts, 2)
            q = rotary_append_(q, k, v, cos, sin, suffix[0], suffix[1], own)
            out = group_decode_attention(
                *(q, *prefix, *suffix),
                prefix_lengths=self.prefix_lengths,
                suffix_lengths=self.suffix_lengths,
                group_size=self.group_size,
                q_positions=at.slot,
                mask=self.mask,
            )
            x = _after(layer, x, out)
        self._draw(policy.norm(x.index_select(1, at.predicting)), at)

    def _draw(self, hidden: Tensor, at: _Indices) -> None:
        """Draw tokens from hidden states [B, K, D]: a draw a place, each with its own number."""
        weight, sampling, (b, k, _) = self.policy.lm_head.weight, self.sampling, hidden.shape
        hidden = hidden.flatten(0, 1)
        logits = head_logits(hidden, weight).view(b, k, -1)
        truncates, greedy = sampling.truncates, sampling.temperature == 0
        found: list[tuple[Tensor, ...]] = []
        if truncates or not greedy:
            for i in range(k):
                found.append(
                    sample_tokens(
                        logits[:, i],
                        temperature=sampling.temperature or 1.0,
                        top_k=sampling.top_k,
                        top_p=sampling.top_p,
                        min_p=sampling.min_p,
                        seed=self.seed,
                        offset=at.offset[i],
                        row_ids=self.row_ids,
                        return_support=truncates,
                    )
                )
        parts = [torch.stack(x, 1) for x in zip(*found, strict=True)]
        support = parts[3] if truncates else None
        if greedy:
            token = logits.argmax(-1)
            flat = None if support is None else support.flatten(0, 1)
            scored = selected_logprob(hidden, weight, token.flatten(), support=flat)
            parts = [token, *(x.view(b, k) for x in scored if x is not None)]
        self.known.index_copy_(1, at.target, parts[0])
        self.logprob.index_copy_(1, at.target, parts[1])
        self.entropy.index_copy_(1, at.target, parts[2])
        if self.support is not None and support is not None:
            self.support.index_copy_(1, at.target, support)


def _after(layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a layer, from what its attention gives."""
    x = x + layer.self_attn.o_proj(attended.flatten(2))
    return x + layer.mlp(x)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for keys or values. What is in it before it is written does not matter."""
    return torch.empty(shape, dtype=dtype, device=device)
