"""The policy's loss: GRPO, Dr. GRPO, BNPO, DAPO, CISPO and GSPO, with its statistics.

loss = mean(kl_weight kl - min(min(c, delta) A, clip(c, 1 - low, 1 + high) A)), c = exp(p - p_old)

This file is longer than most: sixteen arguments, in the op, the reference and the checks.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.tracing import traced

LossType = Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo"]
ImportanceLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]

_LOSS_TYPES, _LEVELS, _ESTIMATORS = map(get_args, (LossType, ImportanceLevel, KlEstimator))
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KL_LIMIT = 20.0  # k3's exponent stops here: exp(88) would be infinite, exp(20) is absurd already


@dataclass(frozen=True)
class PolicyLossStatistics:
    """What the forward pass saw: tensors without dimensions, on the device, without gradient.

    Means are over the tokens inside the mask. Those of the ratio (from ``ratio`` to ``outside``)
    are over rows where ``importance_level="sequence"``, as a row has one ratio. All are 0 where no
    token counts.
    """

    tokens: Tensor
    """How many tokens count."""
    kl: Tensor | None
    """Mean of the KL term before ``kl_weight``; None without ``ref_logprob``."""
    old_kl: Tensor
    """Mean of old_logprob - logprob: how far the policy moved from the one that sampled (k1)."""
    ratio: Tensor
    """Mean ratio c."""
    ratio_min: Tensor
    """Smallest ratio."""
    ratio_max: Tensor
    """Largest ratio, before ``delta``."""
    ess: Tensor
    """Effective sample size of the ratios as a share of their number: mean(c)^2 / mean(c^2)."""
    clipped_low: Tensor
    """Share with c < 1 - clip_low and A < 0: the clip stops these (0 for cispo)."""
    clipped_high: Tensor
    """Share with c > 1 + clip_high (cispo: clip_high) and A > 0: the clip stops these."""
    clipped_delta: Tensor
    """Share with c > delta and A < 0: ``delta`` stops these."""
    outside: Tensor
    """Share whose ratio lies outside the clip range, whatever the advantage."""
    importance: Tensor | None
    """Mean weight min(exp(old - rollout), cap); None without ``rollout_logprob``."""
    truncated: Tensor | None
    """Share of tokens whose weight the cap cut; None without ``rollout_logprob``."""


@traced
def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    loss_type: LossType = "grpo",
    importance_level: ImportanceLevel = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    kl_weight: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    kl_importance: bool = False,
    rollout_logprob: Tensor | None = None,
    truncated_importance: float | None = None,
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, PolicyLossStatistics]:
    """Clipped policy-gradient loss of a batch of sequences, and statistics from the same pass.

    With a token's log-probabilities p (policy), o (old), q (reference), u (rollout), and A::

        c    = exp(p - o), or exp(mean over the row of p - o) at sequence level (GSPO)
        gain = v min(min(c, delta) A, clip(c, 1 - clip_low, 1 + clip_high) A)
        gain = v A p min(c, clip_high), the last factor a constant          ("cispo")
        v    = min(exp(o - u), truncated_importance), 1 where u is NaN or not given
        kl   = p - q ("k1"), (p - q)^2 / 2 ("k2"), exp(q - p) - (q - p) - 1 ("k3")
        loss = sum of (kl_weight kl - gain) over tokens inside the mask, divided by:

        "grpo"           each row by its number of tokens, then the sum of rows by B
        "bnpo"           the number of tokens
        "dr_grpo"        B max_length
        "dapo", "cispo"  normalizer (the token count of the whole batch, across processes)

    Value and gradient are those of TRL's ``GRPOTrainer`` (1.16) for these loss types and levels.

    Args:
        logprob: [B, T], of the policy. float64, float32, bfloat16 or float16, with any strides,
            like the other log-probabilities, whose dtypes may differ. Alone receives a gradient.
        old_logprob: [B, T], of the policy that the batch was scored with before the update.
        advantages: [B], [B, 1] or [B, T].
        ref_logprob: [B, T], of the frozen reference; needed where ``kl_weight`` is not 0.
        mask: bool [B, T]; a token that is False adds nothing, whatever it holds.
        loss_type: what is clipped and what is divided by.
        importance_level: whether the ratio is that of a token or of a row.
        clip_low: width of the clip range below 1 (PPO's 0.2). Not used by "cispo".
        clip_high: width above 1; for "cispo" the cap itself, as TRL's ``epsilon_high`` (there 5.0).
        delta: cap of the ratio where A < 0 (INTELLECT-2's two-sided clip, PPO's dual clip), > 1
            + ``clip_high``; not used by "cispo".
        kl_weight: of the KL term (TRL's beta).
        kl_estimator: "k3" is that of GRPO and TRL. k1 as a loss has a gradient whose mean is 0.
        kl_importance: multiply kl by c, through which a gradient flows too: unbiased off-policy
            (DeepSeek-V3.2; TRL's ``use_bias_correction_kl``, there on by default).
        rollout_logprob: [B, T], of the engine that sampled, if it is another one than the trainer.
        truncated_importance: cap of exp(old - rollout); math.inf for none. Together with it.
        normalizer: > 0; a number, or a tensor without dimensions (read on the device, where a wrong
            one gives NaN and fails an assertion). None: the number of tokens inside the mask.
        max_length: >= 1; None: T.

    Returns:
        The loss, a tensor without dimensions (float64 if an input is, otherwise float32), and
        statistics. A batch without tokens has loss 0, gradient 0. The bits do not depend on the
        number of threads nor, in float32, on the instruction set.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_level": importance_level,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "delta": delta,
        "kl_weight": kl_weight,
        "kl_estimator": kl_estimator,
        "kl_importance": kl_importance,
        "truncated_importance": truncated_importance,
    }
    tensors = (old_logprob, advantages, ref_logprob, mask, rollout_logprob)
    _check(logprob, *tensors, normalizer, max_length, **options)
    if not _library.has_kernels(logprob):
        return _reference(logprob, *tensors, normalizer, max_length, **options)
    on_device = isinstance(normalizer, Tensor)
    inputs = (logprob, *tensors, normalizer if on_device else None)
    lengths = {"divisor": None if on_device else normalizer, "max_length": max_length}
    eager = torch.is_grad_enabled() and logprob.requires_grad and not torch.compiler.is_compiling()
    try:
        if eager:
            loss, values = _Eager.apply(options, lengths, *inputs)
        else:
            loss, values, _ = torch.ops.rlir.policy_loss.default(*inputs, **options, **lengths)
    except RuntimeError as error:
        if str(error).startswith("policy_loss: "):  # what only a look at the normalizer can tell
            raise InputError(str(error).splitlines()[0]) from None
        raise
    return loss, _statistics(values.detach(), ref_logprob, rollout_logprob)


def policy_loss_reference(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    loss_type: LossType = "grpo",
    importance_level: ImportanceLevel = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    kl_weight: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    kl_importance: bool = False,
    rollout_logprob: Tensor | None = None,
    truncated_importance: float | None = None,
    normalizer: float | Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, PolicyLossStatistics]:
    """``policy_loss`` in plain PyTorch, on any device: what the kernels are held to.

    Works in float64 if an input is float64, otherwise in float32. Its gradient is autograd's.
    """
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_level": importance_level,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "delta": delta,
        "kl_weight": kl_weight,
        "kl_estimator": kl_estimator,
        "kl_importance": kl_importance,
        "truncated_importance": truncated_importance,
    }
    tensors = (old_logprob, advantages, ref_logprob, mask, rollout_logprob)
    _check(logprob, *tensors, normalizer, max_length, **options)
    return _reference(logprob, *tensors, normalizer, max_length, **options)


def _statistics(
    values: Tensor, ref_logprob: Tensor | None, rollout_logprob: Tensor | None
) -> PolicyLossStatistics:
    found: list[Tensor | None] = list(values.unbind())
    if ref_logprob is None:
        found[1] = None
    if rollout_logprob is None:
        found[-2:] = [None, None]
    return PolicyLossStatistics(*found)  # type: ignore[arg-type]  # the order is that of the fields


def _reference(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    mask: Tensor | None,
    rollout_logprob: Tensor | None,
    normalizer: float | Tensor | None,
    max_length: int | None,
    *,
    loss_type: str,
    importance_level: str,
    clip_low: float,
    clip_high: float,
    delta: float | None,
    kl_weight: float,
    kl_estimator: str,
    kl_importance: bool,
    truncated_importance: float | None,
) -> tuple[Tensor, PolicyLossStatistics]:
    b, t = logprob.shape
    given = (logprob, old_logprob, advantages, ref_logprob, rollout_logprob)
    wide = any(x is not None and x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if wide else torch.float32
    counts = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    m = counts.to(dtype)
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]

    def clean(x: Tensor) -> Tensor:  # outside the mask anything may stand, also NaN
        return x.to(dtype).expand(b, t).where(counts, 0)

    p, o, a = clean(logprob), clean(old_logprob).detach(), clean(advantages).detach()
    n = m.sum(1, keepdim=True)  # [B, 1]
    log_ratio = p - o
    if importance_level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / n.clamp(min=1)).expand(b, t)
    idle = a == 0  # nothing to gain, also where the ratio is infinite
    c = log_ratio.where(~idle, log_ratio.detach()).exp()
    if loss_type == "cispo":
        low, high, cap = -math.inf, clip_high, math.inf
        gain = c.detach().clamp(max=clip_high) * a * p.where(~idle, 0)
    else:
        low, high, cap = 1 - clip_low, 1 + clip_high, math.inf if delta is None else delta
        gain = torch.minimum(c.clamp(max=cap) * a, c.clamp(low, high) * a)
    gain = gain.where(~idle, 0)
    weight = torch.ones_like(p)
    if rollout_logprob is not None and truncated_importance is not None:
        uncut = (o - clean(rollout_logprob).detach()).exp().nan_to_num(nan=1.0, posinf=math.inf)
        weight = uncut.clamp(max=truncated_importance)
        gain = (gain * weight).where(~idle, 0)
    kl = torch.zeros_like(p)
    if ref_logprob is not None:
        kl = _kl(p, clean(ref_logprob).detach(), kl_estimator)
        kl = kl * log_ratio.exp() if kl_importance else kl
    term = (kl_weight * kl - gain if kl_weight else -gain).where(counts, 0)

    tokens = n.sum()
    if loss_type == "grpo":
        loss = (term.sum(1, keepdim=True) / n.clamp(min=1)).sum() / max(b, 1)
    elif loss_type == "dr_grpo":
        loss = term.sum() / (max(b, 1) * (max(t, 1) if max_length is None else max_length))
    elif loss_type == "bnpo" or normalizer is None:
        loss = term.sum() / tokens.clamp(min=1)
    else:
        whole = normalizer
        if isinstance(normalizer, Tensor):
            whole = normalizer.detach().reshape(()).to(dtype)
        loss = term.sum() / whole

    with torch.no_grad():
        c = log_ratio.detach().exp()
        present = counts
        if importance_level == "sequence":  # a row counts once: by its tokens' mean
            present, share = counts.any(1, keepdim=True).expand(b, t), m / n.clamp(min=1)
            number = (n > 0).sum().clamp(min=1)
        else:
            share, number = m, tokens.clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return (x.to(dtype) * share).where(counts, 0).sum() / number

        def token_mean(x: Tensor) -> Tensor:
            return x.to(dtype).where(counts, 0).sum() / tokens.clamp(min=1)

        square = mean(c * c)
        some = present.any()
        extremes = (c.where(present, s * math.inf) for s in (1, -1))
        zero = c.new_zeros(())
        lowest, highest = (x.flatten() for x in extremes)
        cut = zero.expand(b, t)
        if rollout_logprob is not None and truncated_importance is not None:
            cut = uncut > truncated_importance
        values = (
            tokens,
            token_mean(kl),
            token_mean(o - p),
            mean(c),
            torch.where(some, lowest.amin() if b * t else zero, zero),
            torch.where(some, highest.amax() if b * t else zero, zero),
            torch.where((square > 0) & ~square.isinf(), mean(c) ** 2 / square, zero * square),
            mean((c < low) & (a < 0)),
            mean((c > high) & (a > 0)),
            mean((c > cap) & (a < 0)),
            mean((c < low) | (c > high)),
            token_mean(weight),
            token_mean(cut),
        )
    return loss, _statistics(torch.stack(values), ref_logprob, rollout_logprob)


def _kl(p: Tensor, q: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return p - q
    if estimator == "k2":
        return (p - q).square() / 2
    x = q - p
    return x.clamp(max=_KL_LIMIT).expm1() - x


def _check(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    mask: Tensor | None,
    rollout_logprob: Tensor | None,
    normalizer: float | Tensor | None,
    max_length: int | None,
    *,
    loss_type: str,
    importance_level: str,
    clip_low: float,
    clip_high: float,
    delta: float | None,
    kl_weight: float,
    kl_estimator: str,
    kl_importance: bool,
    truncated_importance: float | None,
) -> None:
    def refuse(what: str, got: object) -> None:
        raise InputError(f"policy_loss: {what}, got {got}")

    if logprob.dim() != 2:
        refuse("logprob must be [B, T]", f"shape {tuple(logprob.shape)}")
    shape = logprob.shape
    for name, x in (
        ("logprob", logprob),
        ("old_logprob", old_logprob),
        ("advantages", advantages),
        ("ref_logprob", ref_logprob),
        ("rollout_logprob", rollout_logprob),
        ("mask", mask),
    ):
        if x is None:
            continue
        if name == "mask":
            if x.dtype != torch.bool:
                refuse("mask must be torch.bool", x.dtype)
        elif x.dtype not in _DTYPES:
            refuse(f"{name} must be float64, float32, bfloat16 or float16", x.dtype)
        if name == "advantages":
            if x.shape not in (shape, shape[:1], (shape[0], 1)):
                what = f"advantages must have the shape ({shape[0]},) or {tuple(shape)}"
                refuse(what, tuple(x.shape))
        elif x.shape != shape:
            refuse(f"{name} must have the shape of logprob, {tuple(shape)}", tuple(x.shape))
        if x.device != logprob.device:
            refuse(f"{name} must be on {logprob.device}", x.device)
    if loss_type not in _LOSS_TYPES:
        refuse("loss_type must be 'grpo', 'dr_grpo', 'bnpo', 'dapo' or 'cispo'", repr(loss_type))
    if importance_level not in _LEVELS:
        refuse("importance_level must be 'token' or 'sequence'", repr(importance_level))
    if kl_estimator not in _ESTIMATORS:
        refuse("kl_estimator must be 'k1', 'k2' or 'k3'", repr(kl_estimator))
    if loss_type != "cispo" and not 0 <= clip_low <= 1:
        refuse("clip_low must be between 0 and 1", clip_low)
    if not clip_high >= 0:
        refuse("clip_high must be >= 0", clip_high)
    if delta is not None and not delta > 0:
        refuse("delta must be > 0 or None", delta)
    if not math.isfinite(kl_weight):
        refuse("kl_weight must be finite", kl_weight)
    if kl_weight != 0 and ref_logprob is None:
        refuse("kl_weight must come with ref_logprob", f"{kl_weight} without")
    if (rollout_logprob is None) != (truncated_importance is None):
        name = "rollout_logprob" if truncated_importance is None else "truncated_importance"
        refuse("rollout_logprob must come with truncated_importance", f"{name} alone")
    if truncated_importance is not None and not truncated_importance > 0:
        refuse("truncated_importance must be > 0", truncated_importance)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.device != logprob.device:
            what = f"normalizer must be a number or one on {logprob.device}"
            refuse(what, f"shape {tuple(normalizer.shape)} on {normalizer.device}")
    elif normalizer is not None and not 0 < normalizer < math.inf:
        refuse("normalizer must be > 0 and finite", normalizer)
    if max_length is not None and max_length < 1:
        refuse("max_length must be >= 1", max_length)


if _library.PATH is not None:

    @torch.library.register_fake("rlir::policy_loss")
    def _fake(
        logprob: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        ref_logprob: Tensor | None = None,
        mask: Tensor | None = None,
        rollout_logprob: Tensor | None = None,
        normalizer: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (logprob, old_logprob, advantages, ref_logprob, rollout_logprob)
        wide = any(x is not None and x.dtype == torch.float64 for x in given)
        dtype = torch.float64 if wide else torch.float32
        return (
            logprob.new_empty((), dtype=dtype),
            logprob.new_empty(13, dtype=dtype),
            logprob.new_empty((3, logprob.shape[0]), dtype=torch.float64),
        )

    @torch.library.register_fake("rlir::policy_loss_backward")
    def _fake_backward(grad: Tensor, scales: Tensor, logprob: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(logprob, memory_format=torch.contiguous_format)

    _KEPT = (
        "loss_type",
        "importance_level",
        "clip_low",
        "clip_high",
        "delta",
        "kl_weight",
        "kl_estimator",
        "kl_importance",
        "truncated_importance",
    )

    def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[2], *inputs[:6])
        ctx.options = {name: keyword_only_inputs[name] for name in _KEPT}

    def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None:
            saved = ctx.saved_tensors
            gradient = torch.ops.rlir.policy_loss_backward.default(grad, *saved, **ctx.options)
        return (gradient, None, None, None, None, None, None)

    torch.library.register_autograd("rlir::policy_loss", _backward, setup_context=_setup)

    class _Eager(torch.autograd.Function):
        """The same without the glue of register_autograd, whose time is quadratic in arguments."""

        @staticmethod
        def forward(
            ctx: Any, options: dict[str, Any], lengths: dict[str, Any], *inputs: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():  # as register_autograd's own forward does
                output = torch.ops.rlir.policy_loss.default(*inputs, **options, **lengths)
            _setup(ctx, inputs, options, output)
            return output[0], output[1]

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            return (None, None, *_backward(ctx, grad))
