"""Weights of a policy as the native engine reads them: csrc/cpu/decoder.h."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlir.models.world_model import WorldModel

WeightFormat = Literal["dtype", "int8"]


def _padded(x: Tensor) -> Tensor:
    """float32, the last dimension padded with zeros to whole groups of 16."""
    return F.pad(x.float(), (0, -x.shape[-1] % 16)).contiguous()


def _pack(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices of one shape, rounded, in the panels of csrc/cpu/product.h."""
    out = None
    for i, matrix in enumerate(matrices):
        one = torch.ops.rlir._decoder_pack.default(matrix.to(dtype)[None], dtype == torch.bfloat16)
        if len(matrices) == 1:
            return one
        if out is None:
            out = one.new_empty(len(matrices), *one.shape[1:])
            torch.ops.rlir._huge_pages.default(out)
        out[i] = one[0]
    assert out is not None
    return out


def _quantise(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """int8 values in panels, and the scale of each output: w = scale value, value from -127 to
    127."""
    packed, scales = [], []
    for matrix in matrices:
        scale = (matrix.float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        values = (matrix.float() / scale[:, None]).round_().to(torch.int8)
        packed.append(torch.ops.rlir._decoder_pack_int8.default(values[None]))
        panel = packed[-1].shape[1] * _panel()
        scales.append(F.pad(scale, (0, panel - len(scale))))
    return torch.cat(packed), torch.stack(scales)


def _panel() -> int:
    """Outputs of a panel."""
    one = torch.ops.rlir._decoder_pack.default(torch.zeros(1, 1, 1, dtype=torch.bfloat16), True)
    return int(one.shape[3])


def pack_decoder(model: WorldModel, dtype: torch.dtype, weights: WeightFormat) -> list[Tensor]:
    """Weights in the order of csrc/ops/decoder.cpp, but for the rotary table."""
    layers = model.decoder_layers()
    norms = [(x.input_layernorm.weight, x.post_attention_layernorm.weight) for x in layers]
    slots = getattr(model, "embed_slots", None)
    products = [
        [x.self_attn.qkv_proj.weight for x in layers],
        [x.self_attn.o_proj.weight for x in layers],
        [half for x in layers for half in x.gate_up_proj.weight.chunk(2)],
        [x.down_proj.weight for x in layers],
    ]
    if weights == "int8":
        quantised = [_quantise(matrices) for matrices in products]
        packed, scales = [x for x, _ in quantised], [x for _, x in quantised]
    else:
        packed, scales = [_pack(matrices, dtype) for matrices in products], []
    return [
        _padded(model.embed_tokens.weight.to(dtype)),
        torch.empty(0) if slots is None else _padded(slots.weight.to(dtype)),
        _padded(torch.stack([torch.stack(pair) for pair in norms]).to(dtype)),
        _padded(model.norm.weight.to(dtype)),
        *packed,
        _pack([model.lm_head.weight[: model.config.codes]], dtype),
        *scales,
    ]
