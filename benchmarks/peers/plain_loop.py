"""The yardstick: group rollouts as plain PyTorch allows, frozen as the first version had them.

Inference mode, a static cache allocated once, bf16 weights, the prompt prefilled once a group and
its keys and values copied to the members. It uses nothing of rlir but the model's weights, so that
it stays what it is while the package's own rollouts change.

Legend: B rollouts, G group size, L frames with the prompt, S visual tokens, A action tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(x: Tensor, norm: nn.Module, eps: float) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, eps)


def _linear(x: Tensor, of: nn.Module) -> Tensor:
    """By torch: the model's own projections are the package's."""
    return F.linear(x, of.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _forward(model: nn.Module, x: Tensor, keys: list[Tensor], values: list[Tensor], start: int):
    """One chunk [B, T, D] through all layers. keys [B Hkv, d, P], values [B Hkv, P, d]."""
    config, (b, t, _) = model.config, x.shape
    heads, kv_heads, end = config.heads, config.kv_heads, start + t
    dim = config.hidden // heads
    cos, sin = model.rotary[:, start:end].to(x.dtype)
    for layer, k_cache, v_cache in zip(model.layers, keys, values, strict=True):
        attention = layer.self_attn
        qkv = _linear(_norm(x, layer.input_layernorm, config.norm_eps), attention.qkv_proj)
        qk, v = qkv.view(b, t, -1, dim).transpose(1, 2).split([heads + kv_heads, kv_heads], 1)
        q, k = _rotate(qk, cos, sin).split([heads, kv_heads], 1)
        k_cache[:, :, start:end] = k.flatten(0, 1).transpose(1, 2)
        v_cache[:, start:end] = v.flatten(0, 1)
        shared = q.reshape(b * kv_heads, -1, dim)
        scores = torch.bmm(shared, k_cache[:, :, :end]).float().mul_(dim**-0.5)
        if t > 1:
            future = torch.ones(t, end, dtype=torch.bool).triu_(start + 1)
            scores = scores.unflatten(1, (-1, t)).masked_fill_(future, -torch.inf).flatten(1, 2)
        out = torch.bmm(scores.softmax(-1).to(x.dtype), v_cache[:, :end]).view(b, heads, t, dim)
        x = x + _linear(out.transpose(1, 2).flatten(2), attention.o_proj)
        gate_up = _linear(
            _norm(x, layer.post_attention_layernorm, config.norm_eps), layer.gate_up_proj
        )
        gate, up = gate_up.chunk(2, -1)
        x = x + _linear(F.silu(gate) * up, layer.down_proj)
    return x


@torch.inference_mode()
def plain_rollout(
    model: nn.Module,
    prompts: Tensor,
    blocks: Tensor,
    group_size: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue prompts [P, S] under action token blocks [P, L - 1, A].

    ``model`` is a bf16 world model. Returns codes [P G, L, S] and log-probabilities
    [P G, L - 1, S] of the sampled tokens.
    """
    config, (p, s) = model.config, prompts.shape
    a, length, b = model.action_tokens, blocks.shape[1] + 1, p * group_size
    dim, dtype = config.hidden // config.heads, model.lm_head.weight.dtype
    positions = s + (length - 1) * (a + s)

    def cache(batch: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
        rows, n = batch * config.kv_heads, len(model.layers)
        keys = [torch.empty(rows, dim, size, dtype=dtype) for _ in range(n)]
        return keys, [torch.empty(rows, size, dim, dtype=dtype) for _ in range(n)]

    def embed(ids: Tensor, start: int) -> Tensor:
        slots = (torch.arange(start, start + ids.shape[1]) + a) % config.block
        return model.embed_tokens(ids) + model.embed_slots(slots)

    once_k, once_v = cache(p, s)
    keys, values = cache(b, positions)
    _forward(model, embed(prompts, 0), once_k, once_v, 0)
    for single, all_of in zip(once_k + once_v, keys + values, strict=True):
        members = single.unflatten(0, (p, -1)).repeat_interleave(group_size, 0).flatten(0, 1)
        (all_of[:, :, :s] if all_of.shape[1] == dim else all_of[:, :s]).copy_(members)
    blocks = blocks.repeat_interleave(group_size, 0)
    codes = torch.empty(b, length, s, dtype=torch.int64)
    codes[:, 0] = prompts.repeat_interleave(group_size, 0)
    logprob = torch.empty(b, length - 1, s)
    start = s
    for t in range(1, length):
        stem = model.stem(codes[:, t - 1], blocks[:, t - 1])
        x = embed(blocks[:, t - 1] + config.codes, start)
        x[:, -1] += stem[:, 0]
        for i in range(s):
            if i:
                x = embed(codes[:, t, i - 1 : i], start) + stem[:, i : i + 1]
            x = _forward(model, x, keys, values, start)
            start += x.shape[1]
            last = _norm(x[:, -1], model.norm, config.norm_eps)
            distribution = (_linear(last, model.lm_head).float() / temperature).log_softmax(-1)
            cumulative = distribution.exp().cumsum_(-1)
            draw = torch.rand(b, 1, generator=generator) * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, draw, right=True)[:, 0]
            codes[:, t, i] = token.clamp_(max=config.codes - 1)
            logprob[:, t - 1, i] = distribution.gather(1, codes[:, t, i, None])[:, 0]
        if t + 1 < length:
            _forward(model, embed(codes[:, t, s - 1 :], start), keys, values, start)
            start += 1
    return codes, logprob
