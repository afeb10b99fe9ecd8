"""Philox 4x32-10 and what is drawn with it in plain PyTorch, word for word as in
csrc/core/philox.h.

Key = seed; counter = (block, offset, row id low, row id high). Normal i of a row is number
(i mod 64) / 16 of the four that come from block 16 (i / 64) + i mod 16; a token is drawn with the
words of the last block.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Four words of 32 bits, as int64, of counters of four words (Salmon et al., SC 2011)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64: the bits are right
        a = ((q >> 32) & _WORD) ^ b ^ low
        b = q & _WORD
        c = ((p >> 32) & _WORD) ^ d ^ high
        d = p & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return [a, b, c, d]


def _counter(block: Tensor, offset: Tensor, row_ids: Tensor) -> list[Tensor]:
    return [
        block,
        offset.reshape(()).expand_as(block),
        (row_ids & _WORD).expand_as(block),
        ((row_ids >> 32) & _WORD).expand_as(block),
    ]


def _key(seed: Tensor) -> tuple[Tensor, Tensor]:
    seed = seed.reshape(())
    return seed & _WORD, (seed >> 32) & _WORD


def draw_uniform(seed: int | Tensor, offset: int | Tensor, row_ids: Tensor) -> Tensor:
    """What each row draws a token with, in [0, 1): float64 [N], the upper 53 of 64 bits."""
    numbers = [torch.as_tensor(x, dtype=torch.int64, device=row_ids.device) for x in (seed, offset)]
    counter = _counter(torch.full_like(row_ids, _WORD), numbers[1], row_ids)
    low, high, _, _ = philox(counter, _key(numbers[0]))
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def normals(seed: Tensor, offset: Tensor, row_ids: Tensor, size: int) -> Tensor:
    """Standard normals float32 [rows, size]: Box-Muller in float64 of
    float32 uniforms, rounded."""
    tiles = -(-size // 64)
    block = torch.arange(tiles * 16, device=row_ids.device)[None].expand(len(row_ids), -1)
    words = philox(_counter(block, offset, row_ids[:, None]), _key(seed))
    parts = []
    for first, second in (words[:2], words[2:]):
        uniform = (first >> 1).float() * 2.0**-31 + 2.0**-32  # float32: part of the definition
        r = (-2 * uniform.double().log()).sqrt()
        angle = second.double() * (2 * math.pi * 2.0**-32)
        parts += [r * angle.cos(), r * angle.sin()]
    z = torch.stack(parts, 1).view(len(row_ids), 4, tiles, 16).transpose(1, 2)
    return z.reshape(len(row_ids), tiles * 64)[:, :size].float()
