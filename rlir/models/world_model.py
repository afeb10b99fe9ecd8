"""Autoregressive world model: a Llama-style decoder over frame tokens and action tokens.

Stream (MineWorld, arXiv 2504.08388): image_0 | action_1 image_1 | action_2 image_2 | ...
An image is its visual codes in raster order; an action is a block of tokens; action i conditions
image i. Only visual tokens of image_1 and later are predicted.

Beside the decoder stands a *local-dynamics stem*: convolutions over the previous frame's token
grid, modulated by the action, whose output is added where each visual token is predicted. A small
decoder learns late that actions matter; the stem sees at once that a turn shifts the picture.
It is causal (it reads earlier frames alone) and runs once a frame.

Without the stem and without the embeddings of slots it is a plain Llama (``rlir.models.llama``).

Legend: B clips, L frames, S visual tokens a frame, A action tokens, V codes, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlir.actions.space import action_space
from rlir.errors import InputError
from rlir.models.stem import Stem, engine_stem
from rlir.ops import Mask, causal, embedding, linear, rms_norm, rotary, swiglu, video_attention
from rlir.rollout.layout import known_tokens, layout_of
from rlir.rollout.schedule import Plan, Schedule, sequential

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q [B, T, H, d], k and v [B, T, Hkv, d]: which token sees which is its own."""


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of a world model. The defaults are those of the embedded Doom model."""

    space: str = "doom"
    """Action space by name."""
    codes: int = 1024
    """Visual codes V of the tokenizer."""
    rows: int = 8
    """Rows of a frame's token grid."""
    columns: int = 12
    """Columns of a frame's token grid."""
    frames: int = 5
    """Frames of the longest clip, the prompt included."""
    hidden: int = 256
    """Hidden size D."""
    layers: int = 5
    """Decoder layers."""
    heads: int = 4
    """Query heads of an attention layer."""
    kv_heads: int = 2
    """Key and value heads (grouped-query attention)."""
    mlp: int = 704
    """Width of the SiLU-gated MLP."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    stem_channels: int = 128
    """Channels of the local-dynamics stem; 0: no stem."""
    stem_blocks: int = 2
    """Residual blocks of the stem."""
    slot_embeddings: bool = True
    """Whether a token's place in its block is embedded beside its id."""
    action_vocabulary: int | None = None
    """Ids above the codes, of a vocabulary that was made elsewhere: the space's tokens come first,
    what is left over is kept, and so are the output head's rows of all of them, which nothing is
    drawn from. None: the space's tokens alone, and no such rows."""

    def __post_init__(self) -> None:
        for name in ("codes", "rows", "columns", "hidden", "layers", "heads", "kv_heads", "mlp"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"world model: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.frames < 2 or self.stem_channels < 0 or self.stem_blocks < 0:
            raise InputError(
                f"world model: frames must be >= 2, stem_channels >= 0 and stem_blocks >= 0, "
                f"got {self.frames}, {self.stem_channels}, {self.stem_blocks}"
            )
        if self.hidden // self.heads % 2 or self.hidden // self.heads > 256:
            raise InputError(
                "world model: hidden / heads must be even and at most 256, "
                f"got {self.hidden} / {self.heads}"
            )
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise InputError(
                f"world model: hidden % heads and heads % kv_heads must be 0, "
                f"got {self.hidden}, {self.heads}, {self.kv_heads}"
            )
        if self.action_vocabulary is not None:
            least = action_space(self.space).vocabulary
            if self.action_vocabulary < least:
                raise InputError(
                    f"world model: action_vocabulary must be at least the {least} tokens of "
                    f"{self.space}, got {self.action_vocabulary}"
                )

    @property
    def tokens(self) -> int:
        """Visual tokens a frame, S."""
        return self.rows * self.columns

    @property
    def block(self) -> int:
        """Tokens a generated frame adds to the stream: its action block and its image."""
        return self.tokens + action_space(self.space).block_tokens

    @property
    def vocabulary(self) -> int:
        """Token ids: codes, then action tokens."""
        if self.action_vocabulary is None:
            return self.codes + action_space(self.space).vocabulary
        return self.codes + self.action_vocabulary

    @property
    def positions(self) -> int:
        """Tokens of the longest stream."""
        return self.tokens + (self.frames - 1) * self.block


def operand_dtype(weight: Tensor) -> torch.dtype:
    """Of the operands of products: bfloat16 under autocast, else the weights'."""
    device = weight.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.bfloat16 if autocast else weight.dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums of such operands, and of the residual stream: float32, or float64."""
    return dtype if dtype == torch.float64 else torch.float32


def rotary_table(config: WorldModelConfig, start: int = 0, end: int | None = None) -> Tensor:
    """cos and sin of positions and channel pairs, float32 [2, end - start, head_dim].

    Those of the longest clip if ``end`` is None.
    """
    end = config.positions if end is None else end
    dim = config.hidden // config.heads
    frequency = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(start, end, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)  # half-rotation layout
    return torch.stack([angle.cos(), angle.sin()]).float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in the operands' dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = operand_dtype(self.weight)
        return rms_norm(x, self.weight.to(dtype), self.eps, dtype=dtype)


class Projection(nn.Linear):
    """A linear layer without bias. Operands are of their dtype, sums and results float32."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = operand_dtype(self.weight)
        return linear(x.to(dtype), self.weight, dtype=sum_dtype(dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.dim = config.hidden // config.heads
        width = (config.heads + 2 * config.kv_heads) * self.dim
        self.qkv_proj = Projection(config.hidden, width)
        self.o_proj = Projection(config.hidden, config.hidden)

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, T, H, d], rotated k and plain v [B, T, Hkv, d], in the operands' dtype."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.dim))
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 2)
        dtype = operand_dtype(self.qkv_proj.weight)
        q, k = rotary(qk, *table).to(dtype).split([self.heads, self.kv_heads], 2)
        return q, k, v.to(dtype)

    def forward(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        out = attend(*self.project(x, table))
        merged: Tensor = self.o_proj(out.flatten(2))
        return merged


class Layer(nn.Module):
    """Pre-norm attention and a SiLU-gated MLP. The residual stream is float32."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.gate_up_proj = Projection(config.hidden, 2 * config.mlp)
        self.down_proj = Projection(config.mlp, config.hidden)

    def mlp(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(self.post_attention_layernorm(x))
        out: Tensor = self.down_proj(swiglu(gate_up, dtype=operand_dtype(self.down_proj.weight)))
        return out

    def forward(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table, attend)
        return x + self.mlp(x)


class WorldModel(nn.Module):
    """p(visual tokens | earlier tokens, actions)."""

    rotary: Tensor
    action_head: Tensor
    """Rows [action_vocabulary, D] of the head that nothing is drawn from, if the config has any."""
    origin: dict[str, Any] | None = None
    """Of the file that the weights came from: what ``rlir.models.llama.save_llama`` writes back."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = config
        self.action_tokens = action_space(config.space).block_tokens
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        slots = config.slot_embeddings
        self.embed_slots = nn.Embedding(config.block, config.hidden) if slots else None
        self.stem = Stem(config) if config.stem_channels else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = Projection(config.hidden, config.codes)
        if config.action_vocabulary is not None:
            self.register_buffer(
                "action_head", torch.zeros(config.action_vocabulary, config.hidden)
            )
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self._longer: Tensor | None = None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if self.stem is not None:
            nn.init.normal_(self.stem.embed.weight, std=0.5)
            nn.init.normal_(self.stem.action.weight, std=0.3)
            nn.init.zeros_(self.stem.output.weight)
            nn.init.zeros_(self.stem.output.bias)
        for layer in self.decoder_layers():  # residual branches start small, as in GPT-2
            for projection in (layer.self_attn.o_proj, layer.down_proj):
                nn.init.normal_(projection.weight, std=0.02 / (2 * self.config.layers) ** 0.5)

    @torch.no_grad()
    def relate_codes(self, latents: Tensor) -> None:
        """Start the tables of the visual codes from what the codes are: latents [V, n].

        Finite scalar quantisation numbers a grid: a code is n levels. A row starts as the sum of
        one random vector a channel and level, so codes that share levels share most of their rows
        and what is learnt of one serves its neighbours. Rows then train freely.
        """
        digits = [torch.unique(channel, return_inverse=True)[1] for channel in latents.T]
        tables = [self.embed_tokens.weight, self.lm_head.weight]
        if self.stem is not None:
            tables.insert(1, self.stem.embed.weight)
        for table in tables:
            rows = table[: self.config.codes]
            std = float(rows.std()) / len(digits) ** 0.5
            shared = torch.zeros_like(rows)
            for digit in digits:
                vectors = torch.randn(int(digit.max()) + 1, rows.shape[1]) * std
                shared += vectors[digit]
            rows.copy_(shared)

    def decoder_layers(self) -> list[Layer]:
        """The decoder's layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def action_ids(self, actions: Tensor) -> Tensor:
        """Token blocks of action classes: [..., F] -> [..., A], counted from 0."""
        space = action_space(self.config.space)
        return torch.from_numpy(space.to_tokens(actions.numpy()))

    def stream(self, codes: Tensor, actions: Tensor) -> Tensor:
        """Token ids of codes [B, L, S] and action blocks [B, L - 1, A]: [B, S + (L-1)(A+S)]."""
        blocks = torch.cat([actions + self.config.codes, codes[:, 1:]], -1)
        return torch.cat([codes[:, 0], blocks.flatten(1)], 1)

    def slots(self, start: int, count: int) -> Tensor:
        """The slot within a block of stream positions start..start+count: action slots first."""
        return (torch.arange(start, start + count) + self.action_tokens) % self.config.block

    def embed(self, ids: Tensor, start: int) -> Tensor:
        """Embeddings (float32) of ids [B, T] that stand at stream positions start.. ."""
        return self.embed_at(ids, self.slots(start, ids.shape[1]).to(ids.device))

    def embed_at(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Embeddings (float32) of ids [B, T] at slots [T] of a block."""
        dtype = operand_dtype(self.embed_tokens.weight)
        x = embedding(ids, self.embed_tokens.weight, dtype=dtype).to(sum_dtype(dtype))
        if self.embed_slots is not None:
            x = x + embedding(slots, self.embed_slots.weight, dtype=dtype).to(x.dtype)
        return x

    def rotary_until(self, end: int) -> Tensor:
        """cos and sin of positions 0 .. end - 1, [2, end, head_dim]; there is no last one."""
        have = self.rotary.shape[1]
        if end <= have:
            return self.rotary[:, :end]
        longer = self._longer
        if longer is None or longer.shape[1] < end or longer.device != self.rotary.device:
            more = rotary_table(self.config, have, end).to(self.rotary)
            longer = self._longer = torch.cat([self.rotary, more], 1)
        return longer[:, :end]

    def hidden(
        self,
        codes: Tensor,
        actions: Tensor,
        *,
        schedule: Schedule | None = None,
        context: int = 1,
    ) -> Tensor:
        """Final hidden states that predict the visual tokens of frames 1.., [B, L - 1, S, D].

        They are those that a rollout under ``schedule`` (raster order if None) draws from: of a
        diagonal one with stand-ins and under its mask. Of a clip longer than ``config.frames``
        that many frames are seen.

        Args:
            codes: int64 [B, L, S]; actions: token blocks int64 [B, L - 1, A], counted from 0.
            context: the first frames, which were given: their tokens come in raster order.
        """
        config, length = self.config, codes.shape[1]
        plan = (schedule or sequential()).plan(config.rows, config.columns)
        window = config.frames if length > config.frames else None
        if not plan.raster:
            mask = plan.mask(self.action_tokens, context, window)
            return self._hidden_diagonal(codes, actions, plan, mask, context)
        mask = causal() if window is None else plan.mask(self.action_tokens, context, window)
        a, s = self.action_tokens, config.tokens
        ids = self.stream(codes, actions)[:, :-1]
        x = self.embed(ids, 0)
        if self.stem is not None:
            # The hidden state at the last action token predicts slot 0, that at slot i slot i + 1.
            padded = F.pad(self.stem_output(self.stem, codes, actions), (0, 0, a - 1, 1))
            x = x + F.pad(padded.flatten(1, 2), (0, 0, s, 0))[:, : ids.shape[1]]
        attend = partial(video_attention, mask=mask)
        x = self.decode(x, self.rotary_until(ids.shape[1]), attend)
        x = F.pad(x[:, s:], (0, 0, 0, 1)).view(len(codes), length - 1, config.block, -1)
        out: Tensor = self.norm(x[:, :, a - 1 : a - 1 + s])
        return out

    def _hidden_diagonal(
        self, codes: Tensor, actions: Tensor, plan: Plan, mask: Mask, context: int
    ) -> Tensor:
        layout = layout_of(plan, self.action_tokens, codes.shape[1], context)
        # The last token is fed to nothing.
        token, position, slots = (
            torch.from_numpy(x[:-1]).to(codes.device)
            for x in (layout.token, layout.position, layout.embed)
        )
        predicts = torch.from_numpy(layout.predicts.reshape(-1)).to(codes.device)
        ids = known_tokens(codes, actions, self.config.codes).index_select(1, token)
        x = self.embed_at(ids, slots)
        if self.stem is not None:
            x = x.index_add(1, predicts, self.stem_output(self.stem, codes, actions).flatten(1, 2))
        table = self.rotary_until(int(layout.position.max()) + 1)
        attend = partial(video_attention, mask=mask)
        x = self.decode(x, table.index_select(1, position), attend)
        out: Tensor = self.norm(x.index_select(1, predicts))
        return out.unflatten(1, layout.predicts.shape)

    def stem_output(self, stem: Stem, codes: Tensor, actions: Tensor) -> Tensor:
        """The stem's output for the visual tokens of frames 1.., [B, L - 1, S, D]."""
        dtype = operand_dtype(self.embed_tokens.weight)
        out = engine_stem(stem, codes[:, :-1].flatten(0, 1), actions.flatten(0, 1), dtype)
        return out.unflatten(0, actions.shape[:2])

    def decode(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """Embeddings [B, T, D] through all layers; table: cos and sin of the T positions."""
        for layer in self.layers:
            x = layer(x, table, attend)
        return x

    def forward(self, codes: Tensor, actions: Tensor) -> Tensor:
        """Logits float32 [B, L - 1, S, V] of the visual tokens of frames 1.. ."""
        logits: Tensor = self.lm_head(self.hidden(codes, actions))
        return logits
