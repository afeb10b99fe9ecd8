"""Autoregressive world model: a Llama-style decoder over frame tokens and action tokens.

Stream (MineWorld, arXiv 2504.08388): image_0 | action_1 image_1 | action_2 image_2 | ...
An image is its visual codes in raster order; an action is a block of tokens; action i conditions
image i. Only visual tokens of image_1 and later are predicted.

Beside the decoder stands a *local-dynamics stem*: convolutions over the previous frame's token
grid, modulated by the action, whose output is added where each visual token is predicted. A small
decoder learns late that actions matter; the stem sees at once that a turn shifts the picture.
It is causal (it reads earlier frames alone) and runs once a frame.

Legend: B clips, L frames, S visual tokens a frame, A action tokens, V codes, D hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlir.actions.space import action_space
from rlir.errors import InputError
from rlir.ops import rms_norm, swiglu


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
    """Channels of the local-dynamics stem."""
    stem_blocks: int = 2
    """Residual blocks of the stem."""

    def __post_init__(self) -> None:
        for name in ("codes", "rows", "columns", "hidden", "layers", "heads", "kv_heads", "mlp"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"world model: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.frames < 2 or self.stem_channels < 1 or self.stem_blocks < 0:
            raise InputError(
                f"world model: frames must be >= 2, stem_channels >= 1 and stem_blocks >= 0, "
                f"got {self.frames}, {self.stem_channels}, {self.stem_blocks}"
            )
        if self.hidden // self.heads % 2:
            raise InputError(
                f"world model: hidden / heads must be even, got {self.hidden} / {self.heads}"
            )
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise InputError(
                f"world model: hidden % heads and heads % kv_heads must be 0, "
                f"got {self.hidden}, {self.heads}, {self.kv_heads}"
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
    def positions(self) -> int:
        """Tokens of the longest stream."""
        return self.tokens + (self.frames - 1) * self.block


def rotary_table(config: WorldModelConfig) -> Tensor:
    """cos and sin of every position and channel pair, float32 [2, positions, head_dim]."""
    dim = config.hidden // config.heads
    frequency = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(config.positions, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)  # half-rotation layout
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, d] with table [2, T, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    cos, sin = table.to(x.dtype)
    return x * cos + turned * sin


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, rows: int = 128) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v, causal: q [B, H, T, d], k and v [B, Hkv, T, d] -> [B, H, T, d].

    Plain batched products, ``rows`` queries at a time over the keys that they see; heads that
    share keys go through one product. For clips of a few hundred tokens this takes a fraction of
    the time of torch's CPU kernel (benchmarks/bench_training_attention.py).
    """
    b, heads, t, d = q.shape
    n = k.shape[1]
    k, v = k.reshape(b * n, t, d), v.reshape(b * n, t, d)
    q = (q * d**-0.5).reshape(b * n, heads // n, t, d)
    out = []
    for begin in range(0, t, rows):
        part = q[:, :, begin : begin + rows]
        count, seen = part.shape[2], begin + part.shape[2]
        hidden = torch.full((count, seen), -torch.inf, dtype=q.dtype).triu_(begin + 1)
        scores = torch.bmm(part.flatten(1, 2), k[:, :seen].transpose(1, 2))
        weights = (scores.unflatten(1, (-1, count)) + hidden).softmax(-1)
        out.append(torch.bmm(weights.flatten(1, 2), v[:, :seen]).unflatten(1, (-1, count)))
    return torch.cat(out, 2).view(b, heads, t, d)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.dim = config.hidden // config.heads
        width = (config.heads + 2 * config.kv_heads) * self.dim
        self.qkv_proj = nn.Linear(config.hidden, width, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, H, T, d], rotated k and plain v [B, Hkv, T, d]."""
        b, t, _ = x.shape
        qkv = self.qkv_proj(x).view(b, t, -1, self.dim).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = rotate(qk, table).split([self.heads, self.kv_heads], 1)
        return q, k, v

    def merge(self, out: Tensor) -> Tensor:
        merged: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return merged

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.merge(causal_attention(*self.project(x, table)))


class Layer(nn.Module):
    """Pre-norm attention and a SiLU-gated MLP."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.gate_up_proj = nn.Linear(config.hidden, 2 * config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.hidden, bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(self.post_attention_layernorm(x))
        out: Tensor = self.down_proj(swiglu(gate_up))
        return out

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table)
        return x + self.mlp(x)


class Stem(nn.Module):
    """What the previous frame and the action say of each visual token: [N, S] -> [N, S, D]."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        c = config.stem_channels
        self.grid = (config.rows, config.columns)
        space = action_space(config.space)
        self.embed = nn.Embedding(config.codes, 64)
        self.action = nn.Embedding(space.vocabulary, 2 * c * (config.stem_blocks + 1))
        self.input = nn.Conv2d(64, c, (3, 9), padding=(1, 4))
        self.blocks = nn.ModuleList(
            nn.Conv2d(c, c, (3, 5), padding=(1, 2)) for _ in range(config.stem_blocks)
        )
        self.output = nn.Linear(c, config.hidden)

    def forward(self, previous: Tensor, action: Tensor) -> Tensor:
        """previous: codes [N, S]; action: token block [N, A] counted from 0."""
        x = self.input(self.embed(previous).transpose(1, 2).unflatten(2, self.grid))
        film = self.action(action).sum(1)[:, :, None, None].chunk(len(self.blocks) + 1, 1)
        scale, shift = film[0].chunk(2, 1)
        x = F.gelu(x * (1 + scale) + shift)
        for convolution, modulation in zip(self.blocks, film[1:], strict=True):
            scale, shift = modulation.chunk(2, 1)
            x = x + F.gelu(convolution(x) * (1 + scale) + shift)
        out: Tensor = self.output(x.flatten(2).transpose(1, 2))
        return out


class WorldModel(nn.Module):
    """p(visual tokens | earlier tokens, actions)."""

    rotary: Tensor

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = config
        self.action_tokens = action_space(config.space).block_tokens
        vocabulary = config.codes + action_space(config.space).vocabulary
        self.embed_tokens = nn.Embedding(vocabulary, config.hidden)
        self.embed_slots = nn.Embedding(config.block, config.hidden)
        self.stem = Stem(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.codes, bias=False)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
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
        for table in (self.embed_tokens.weight, self.stem.embed.weight, self.lm_head.weight):
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
        """Embeddings of ids [B, T] that stand at stream positions start.. ."""
        out: Tensor = self.embed_tokens(ids) + self.embed_slots(self.slots(start, ids.shape[1]))
        return out

    def hidden(self, codes: Tensor, actions: Tensor) -> Tensor:
        """Final hidden states that predict the visual tokens of frames 1.., [B, L - 1, S, D]."""
        b, length, s = codes.shape
        a, block = self.action_tokens, self.config.block
        ids = self.stream(codes, actions)[:, :-1]
        x = self.embed(ids, 0)
        stem = self.stem(codes[:, :-1].flatten(0, 1), actions.flatten(0, 1))
        # The hidden state at the last action token predicts slot 0, that at slot i slot i + 1.
        padded = F.pad(stem.unflatten(0, (b, length - 1)), (0, 0, a - 1, 1))
        x = x + F.pad(padded.flatten(1, 2), (0, 0, s, 0))[:, : ids.shape[1]].to(x.dtype)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        table = self.rotary[:, : x.shape[1]]
        for layer in self.layers:
            x = layer(x, table)
        x = F.pad(x[:, s:], (0, 0, 0, 1)).view(b, length - 1, block, -1)
        out: Tensor = self.norm(x[:, :, a - 1 : a - 1 + s])
        return out

    def forward(self, codes: Tensor, actions: Tensor) -> Tensor:
        """Logits float32 [B, L - 1, S, V] of the visual tokens of frames 1.. ."""
        return self.lm_head(self.hidden(codes, actions)).float()
