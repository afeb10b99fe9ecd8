"""Group rollouts in one native call a frame: all layers, all tokens, sampling included.

What a rollout draws depends on its prompt, its actions, the seed and its row id alone: not on the
batch, the order, the number of threads or the instruction set. ``rlir.rollout.loop`` is the same in
plain PyTorch and the reference; the two differ by rounding alone. docs/rollout.md has the design.

Legend: P prompts, G group size, B = P G rollouts, L frames with the prompt, S visual tokens,
A action tokens, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.models.stem import packed_stem
from rlir.models.world_model import WorldModel
from rlir.rollout import loop
from rlir.rollout.loop import (
    RolloutOptions,
    Rollouts,
    check_rollout,
    inference_copy,
    row_numbers,
)
from rlir.tracing import span


def rollout_seed(seed: int, number: int) -> int:
    """The key of one batch of rollouts: of a run's seed, below 2^31, and a number below 2^32."""
    return seed << 32 | number


@dataclass(frozen=True)
class _Packed:
    """Weights and sizes as an op wants them: csrc/ops/decoder.cpp, csrc/ops/stem.cpp."""

    weights: list[Tensor]
    sizes: list[int]


def _padded(x: Tensor) -> Tensor:
    """float32, the last dimension padded with zeros to whole groups of 16."""
    return F.pad(x.float(), (0, -x.shape[-1] % 16)).contiguous()


def _pack(matrices: Sequence[Tensor], rounds: bool) -> Tensor:
    """Matrices of one shape in the panels of csrc/cpu/product.h."""
    return torch.ops.rlir._decoder_pack.default(torch.stack(list(matrices)), rounds)


def _pack_decoder(policy: WorldModel, rounds: bool) -> _Packed:
    config, layers = policy.config, policy.decoder_layers()

    def packed(*matrices: Tensor) -> Tensor:
        return _pack(matrices, rounds)

    norms = [(x.input_layernorm.weight, x.post_attention_layernorm.weight) for x in layers]
    weights = [
        _padded(policy.embed_tokens.weight),
        _padded(policy.embed_slots.weight),
        _padded(torch.stack([torch.stack(pair) for pair in norms])),
        _padded(policy.norm.weight),
        policy.rotary.float().contiguous(),
        packed(*(x.self_attn.qkv_proj.weight for x in layers)),
        packed(*(x.self_attn.o_proj.weight for x in layers)),
        packed(*(half for x in layers for half in x.gate_up_proj.weight.chunk(2))),
        packed(*(x.down_proj.weight for x in layers)),
        packed(policy.lm_head.weight),
    ]
    sizes = [config.hidden, config.layers, config.heads, config.kv_heads, config.mlp, config.codes]
    vocabulary = policy.embed_tokens.num_embeddings
    sizes += [vocabulary, config.tokens, config.block, config.positions, int(rounds)]
    return _Packed(weights, sizes)


class RolloutEngine:
    """Rolls out one policy: the weights of a world model as they were when the engine was made.

    Weights are rounded to ``dtype`` and packed once. In bfloat16 the operands of products (weights,
    activations, keys and values) are bfloat16; sums, the residual stream, norms, softmax and logits
    are float32. Weights are packed for the instruction set in use, and only serve that.
    """

    def __init__(self, model: WorldModel, dtype: torch.dtype = torch.bfloat16):
        if dtype not in (torch.bfloat16, torch.float32):
            raise InputError(f"rollout: dtype must be bfloat16 or float32, got {dtype}")
        self.policy = inference_copy(model, dtype)
        self.native = _library.PATH is not None
        with torch.inference_mode():
            if self.native:
                self._packed = _pack_decoder(self.policy, dtype == torch.bfloat16)
                self._stem = _Packed(*packed_stem(self.policy.stem, dtype))

    def rollout(
        self,
        prompts: Tensor,
        actions: Tensor,
        *,
        group_size: int = 1,
        temperature: float = 1.0,
        seed: int,
        row_ids: Tensor | None = None,
    ) -> Rollouts:
        """Continue each prompt ``group_size`` times, as ``rlir.rollout.loop.rollout`` does.

        Args:
            prompts: codes int64 [P, S].
            actions: classes int64 [P, L - 1, F].
            temperature: of sampling; 0 is greedy (the log-probability is then that of the
                untempered model).
            seed: from 0 and below 2^63.
            row_ids: int64 [B], who a rollout is, whatever batch it is in; 0, 1, ... if None.

        Returns:
            Rows grouped: prompt p's members are rows p G .. (p + 1) G. The code at stream position
            n of a rollout is ``sample_tokens`` of its logits with (seed, offset n, row id).
        """
        options = RolloutOptions(group_size, temperature, seed, row_ids)
        if not self.native:
            return loop.rollout(self.policy, prompts, actions, **vars(options))
        check_rollout(self.policy, prompts, actions, options)
        try:
            with span("rollout", len(prompts) * group_size), torch.inference_mode():
                out = self._draw(prompts, actions, group_size, temperature, seed, row_ids)
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            ours = line.startswith(("rollout: ", "decoder: "))
            raise (InputError(line) if ours else error) from None
        # Copied outside of inference mode: autograd takes no tensor that was made in it.
        return Rollouts(*(x.clone() for x in out))

    def _cache(self, sequences: int, positions: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, sequences, kv heads, ...] as in csrc/cpu/decoder.h."""
        config, dim = self.policy.config, self.policy.config.hidden // self.policy.config.heads
        word = self._packed.weights[5].dtype  # int32: two bfloat16
        shape = (config.layers, sequences, config.kv_heads)
        per = 2 if word == torch.int32 else 1
        pairs = self._packed.sizes[-1] == 1  # positions come in pairs
        count = (positions + pairs) // (1 + pairs) * (1 + pairs) // per
        k = torch.empty(*shape, -(-positions // 64), dim // per, 64, dtype=word)
        return k, torch.empty(*shape, count, -(-dim // 16) * 16, dtype=word)

    def _draw(
        self,
        prompts: Tensor,
        actions: Tensor,
        group_size: int,
        temperature: float,
        seed: int,
        row_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        policy, config, ops = self.policy, self.policy.config, torch.ops.rlir
        (p, s), length = prompts.shape, actions.shape[1] + 1
        b = p * group_size
        codes = torch.empty(b, length, s, dtype=torch.int64)
        codes[:, 0] = prompts.repeat_interleave(group_size, 0)
        logprob, entropy = torch.empty(2, b, length - 1, s)
        if not codes[:, 1:].numel():
            return codes, logprob, entropy.mean(0)
        blocks = policy.action_ids(actions).repeat_interleave(group_size, 0)
        given = (self._packed.weights, self._packed.sizes, config.norm_eps)
        shared = self._cache(p, s)
        own = self._cache(b, (length - 1) * config.block)
        with span("rollout.prefill", p * s):
            ops._decoder_prefill.default(*given, prompts.contiguous(), *shared)
        rows = row_numbers(b, row_ids)
        stem = torch.empty(b, s, config.hidden)
        for t in range(1, length):
            with span("rollout.frame", b * s):
                block = blocks[:, t - 1].contiguous()
                previous = codes[:, t - 1].contiguous()
                ops._decoder_stem.default(
                    self._stem.weights, self._stem.sizes, previous, block, stem
                )
                ops._decoder_frame.default(
                    *given, *shared, *own, codes, block, stem, rows, logprob, entropy, t, seed,
                    temperature,
                )  # fmt: skip
        return codes, logprob, entropy.mean(0)
