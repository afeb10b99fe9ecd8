"""Tiny Llama checkpoints for tests, made by transformers, and the same model without rounding."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from testkit import stirred
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlir.actions.space import MINEWORLD
from rlir.checkpoints import CONFIG, WEIGHTS, write_json
from rlir.models.llama import load_llama
from rlir.models.world_model import WorldModel

ROWS, COLUMNS, FRAMES, CODES = 2, 3, 3, 16
GRID: dict[str, Any] = {"rows": ROWS, "columns": COLUMNS, "codes": CODES}
S, A = ROWS * COLUMNS, MINEWORLD.block_tokens
SIZES: dict[str, Any] = {
    "vocab_size": CODES + 70,  # two tokens more than the space names, as in MineWorld
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-4,
    "pad_token_id": None,
}


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """With noise on every weight, so that attention is not even and no row is like another."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    return stirred(model, scale=0.2, seed=seed).eval().requires_grad_(False)


def saved(directory: Path, model: LlamaForCausalLM, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def load(folder: Path, **changes: Any) -> WorldModel:
    return load_llama(folder, **{**GRID, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = CONFIG) -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    write_json(folder / name, config)


def inputs(seed: int = 0, frames: int = FRAMES) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [B, L, S], action blocks [B, L - 1, A] counted from 0, and the stream of them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(CODES, (2, frames, S), generator=generator)
    sizes = MINEWORLD.factor_sizes
    classes = [torch.randint(n, (2, frames - 1), generator=generator) for n in sizes]
    blocks = torch.from_numpy(MINEWORLD.to_tokens(torch.stack(classes, -1).numpy()))
    parts = [codes[:, 0]]
    for i in range(1, frames):
        parts += [blocks[:, i - 1] + CODES, codes[:, i]]
    return codes, blocks, torch.cat(parts, 1)


class ExactNorm(nn.Module):
    """RMSNorm that stays in float64: transformers' own rounds to float32."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class ExactRotary(nn.Module):
    """Angles in float64."""

    def __init__(self, dim: int, theta: float):
        super().__init__()
        self.frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.frequency
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def exact(model: LlamaForCausalLM, theta: float = 10000.0) -> LlamaForCausalLM:
    """The model in float64, with nothing in it that rounds to less."""
    model = model.double()
    for layer in model.model.layers:
        layer.input_layernorm = ExactNorm(layer.input_layernorm)
        layer.post_attention_layernorm = ExactNorm(layer.post_attention_layernorm)
    model.model.norm = ExactNorm(model.model.norm)
    model.model.rotary_emb = ExactRotary(model.config.head_dim, theta)
    return model


def exact_ours(model: WorldModel) -> WorldModel:
    """A world model in float64, with a rotary table that was never float32."""
    config, out = model.config, model.double()
    dim = config.hidden // config.heads
    cos, sin = ExactRotary(dim, config.rope_theta)(out.rotary, torch.arange(config.positions))
    out.rotary = torch.stack([cos, sin])
    return out


def predictions(stream: Tensor, frames: int = FRAMES) -> Tensor:
    """What predicts the visual tokens of frames 1..: [B, T, n] to [B, L - 1, S, n]."""
    rows = []
    for i in range(1, frames):
        first = S + (i - 1) * (A + S) + A  # the frame's first token; it is predicted one before
        rows.append(stream[:, first - 1 : first - 1 + S])
    return torch.stack(rows, 1)
