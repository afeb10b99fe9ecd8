"""Inverse dynamics models: what was done between neighbouring frames of a clip.

A clip of L frames gives L - 1 actions, one class distribution a factor. Plain convolutions fail
to read turns off small frames; a *correlation volume* (how well each place of one frame matches
the next frame, shifted by k columns) makes motion explicit. Two architectures that share no part
of how they match, so that one can judge a model trained against the other:

- ``learned``: learned features, learned matching, a temporal transformer (the reward).
- ``fixed``: fixed normalised cross-correlation of grey patches, a 3D convolution on raw frames,
  batch normalisation, a bidirectional GRU (the judge).

Both see the whole clip (non-causal), as VPT's (arXiv 2206.11795).
Legend: B clips, L frames, H x W pixels, F factors, R largest shift in columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlir.actions.space import action_space
from rlir.errors import InputError


@dataclass(frozen=True)
class InverseDynamicsConfig:
    """Sizes of an inverse dynamics model."""

    architecture: Literal["learned", "fixed"] = "learned"
    """Learned matching with a transformer, or fixed matching with a GRU."""
    space: str = "doom"
    """Action space by name."""
    height: int = 64
    """Frame height in pixels."""
    width: int = 96
    """Frame width in pixels."""
    channels: int = 64
    """Channels of the motion features."""
    hidden: int = 160
    """Width of the temporal model."""
    shift: int = 18
    """Largest horizontal shift that is matched, in columns of the matching grid."""
    max_frames: int = 32
    """Longest clip."""

    def __post_init__(self) -> None:
        if self.architecture not in ("learned", "fixed"):
            raise InputError(
                f"idm: architecture must be 'learned' or 'fixed', got {self.architecture!r}"
            )
        if self.height < 8 or self.width < 16 or self.height % 8 or self.width % 16:
            raise InputError(
                f"idm: height must be a multiple of 8 and width of 16, "
                f"got {self.height} x {self.width}"
            )
        heads = 5 if self.architecture == "learned" else 1
        if self.channels < 8 or self.channels % 8 or self.hidden < heads or self.hidden % heads:
            raise InputError(
                f"idm: channels must be a multiple of 8 and hidden of {heads}, "
                f"got {self.channels} and {self.hidden}"
            )
        if self.shift < 0 or self.max_frames < 2:
            raise InputError(
                f"idm: shift must be >= 0 and max_frames >= 2, "
                f"got {self.shift} and {self.max_frames}"
            )


def correlation_volume(a: Tensor, b: Tensor, shift: int) -> Tensor:
    """``out[n, shift + k, y, x] = sum_c a[n, c, y, x] b[n, c, y, x + k]`` for |k| <= shift.

    a, b: [N, C, H, W]; columns outside are zero. Returns [N, 2 shift + 1, H, W].
    """
    n, _, h, w = a.shape
    full = torch.einsum("nchx,nchy->nhxy", a, b)
    full = F.pad(full, (shift, shift))
    # Row x of the padded matrix starts its window at column x: skew by one column a row.
    skewed = F.pad(full.reshape(n, h, w * (w + 2 * shift)), (0, w))
    window = skewed.view(n, h, w, w + 2 * shift + 1)[..., : 2 * shift + 1]
    return window.permute(0, 3, 1, 2)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return out


class LearnedMatching(nn.Module):
    """Learned features on a (H/8) x (W/2) grid, their correlation volume, a transformer."""

    def __init__(self, config: InverseDynamicsConfig):
        super().__init__()
        c, d = config.channels, config.hidden
        self.shift = config.shift
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, 2),
            nn.GroupNorm(4, 24),
            nn.SiLU(),
            nn.Conv2d(24, 32, (6, 3), (4, 1), 1),
        )
        self.motion = nn.Sequential(
            nn.Conv2d(2 * config.shift + 1 + 64, c, (3, 4), (1, 2), 1),
            nn.GroupNorm(8, c),
            nn.SiLU(),
            _Residual(c),
            nn.Conv2d(c, c, (3, 4), (1, 2), 1),
            nn.GroupNorm(8, c),
            nn.SiLU(),
            _Residual(c),
            nn.Conv2d(c, 48, (3, 4), (1, 2), 1),
            nn.SiLU(),
        )
        self.project = nn.Linear(48 * (config.height // 8) * (config.width // 16), d)
        self.position = nn.Parameter(torch.randn(1, config.max_frames, d) * 0.02)
        layer = nn.TransformerEncoderLayer(
            d, 5, 2 * d, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.temporal = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.width = d

    def forward(self, frames: Tensor) -> Tensor:
        b, length = frames.shape[:2]
        x = self.features(frames.flatten(0, 1)).unflatten(0, (b, length))
        before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
        volume = correlation_volume(
            F.normalize(before, dim=1), F.normalize(after, dim=1), self.shift
        )
        motion = self.motion(torch.cat([3 * volume, before, after - before], 1))
        y = self.project(motion.flatten(1)).unflatten(0, (b, length - 1))
        out: Tensor = self.temporal(y + self.position[:, : length - 1])
        return out


class FixedMatching(nn.Module):
    """Normalised cross-correlation of grey 5x5 patches, a 3D convolution, a bidirectional GRU."""

    def __init__(self, config: InverseDynamicsConfig):
        super().__init__()
        c, d = config.channels, config.hidden
        self.shift = config.shift
        self.appearance = nn.Conv3d(3, 24, (2, 7, 7), (1, 8, 4), (0, 3, 3))
        self.matching = nn.Conv2d(2 * config.shift + 1, c, (3, 5), (1, 2), (1, 2))
        self.first_norm = nn.BatchNorm2d(c + 24)
        self.mix = nn.Conv2d(c + 24, c, (3, 4), (1, 2), 1)
        self.second_norm = nn.BatchNorm2d(c)
        self.mix2 = nn.Conv2d(c, c, (3, 4), (1, 2), 1)
        self.third_norm = nn.BatchNorm2d(c)
        self.project = nn.Linear(c * (config.height // 8) * (config.width // 16), d)
        self.temporal = nn.GRU(d, d, 1, batch_first=True, bidirectional=True)
        self.width = 2 * d

    def patches(self, frames: Tensor) -> Tensor:
        """Unit-norm, zero-mean 5x5 patches of the halved grey frames, [N, 25, H/8, W/2]."""
        grey = F.avg_pool2d(frames.mean(1, keepdim=True).float(), 2)
        n, _, h, w = grey.shape
        x = F.unfold(grey, (5, 5), padding=2, stride=(4, 1)).view(n, 25, h // 4, w)
        x = x - x.mean(1, keepdim=True)
        return x / (x.norm(dim=1, keepdim=True) + 0.05)

    def forward(self, frames: Tensor) -> Tensor:
        b, length = frames.shape[:2]
        x = self.patches(frames.flatten(0, 1)).unflatten(0, (b, length))
        before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
        volume = self.matching(correlation_volume(before, after, self.shift))
        raw = self.appearance(frames.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        y = F.relu(self.first_norm(torch.cat([volume, raw], 1)))
        y = F.relu(self.second_norm(self.mix(y)))
        y = F.relu(self.third_norm(self.mix2(y)))
        y = F.relu(self.project(y.flatten(1))).unflatten(0, (b, length - 1))
        out: Tensor = self.temporal(y)[0]
        return out


class InverseDynamics(nn.Module):
    """Frames float [B, L, 3, H, W] in [-1, 1] to logits of L - 1 actions."""

    def __init__(self, config: InverseDynamicsConfig):
        super().__init__()
        self.config = config
        self.trunk: LearnedMatching | FixedMatching
        if config.architecture == "learned":
            self.trunk = LearnedMatching(config)
        else:
            self.trunk = FixedMatching(config)
        self.sizes = action_space(config.space).factor_sizes
        self.head = nn.Linear(self.trunk.width, sum(self.sizes))

    def features(self, frames: Tensor) -> Tensor:
        """Temporal features, [B, L - 1, width]; what the Frechet distance is taken in."""
        if not 2 <= frames.shape[1] <= self.config.max_frames:
            raise InputError(
                f"idm: clips must have 2 to {self.config.max_frames} frames, got {frames.shape[1]}"
            )
        out: Tensor = self.trunk(frames)
        return out

    def logits(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits of each factor, [B, L - 1, classes]."""
        return self.head(features).split(self.sizes, -1)

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        return self.logits(self.features(frames))

    @torch.no_grad()
    def read(self, frames: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """Most likely classes [B, L - 1, F] and features [B, L - 1, width] of uint8-like frames."""
        classes, features = [], []
        for part in frames.split(batch):
            with torch.autocast("cpu", torch.bfloat16):
                feature = self.features(part)
                logits = self.logits(feature)
            classes.append(torch.stack([x.float().argmax(-1) for x in logits], -1))
            features.append(feature.float())
        return torch.cat(classes), torch.cat(features)
