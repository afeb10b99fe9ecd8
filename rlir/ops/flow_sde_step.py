"""A stochastic sampling step of a rectified flow, with its log-probability, in one pass.

next = mean + std eps, logprob = log N(next; mean, std), averaged over the latent's dimensions
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops._noise import normals
from rlir.tracing import traced

FlowSchedule = Literal["flow_grpo", "dance", "cps"]
_SCHEDULES = get_args(FlowSchedule)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FlowStep(NamedTuple):
    """What ``flow_sde_step`` returns. Legend: B rows, D dimensions of a latent."""

    next: Tensor
    """[B, ...] in the sample's dtype: the sample at ``sigma_next`` (or ``previous``)."""
    logprob: Tensor
    """[B]: log-probability of ``next``, mean over D."""
    mean: Tensor
    """[B, ...]: what ``next`` is drawn around."""
    std: Tensor
    """[B]: standard deviation of ``next`` around ``mean``."""


@traced
def flow_sde_step(
    velocity: Tensor,
    sample: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    schedule: FlowSchedule = "flow_grpo",
    noise_level: float,
    previous: Tensor | None = None,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    row_ids: Tensor | None = None,
) -> FlowStep:
    """One step of an SDE with the marginals of the rectified flow dx = v dsigma.

    With x = (1 - sigma) x0 + sigma noise, v = noise - x0, sigma' = ``sigma_next``,
    dt = sigma - sigma' and a = ``noise_level``:

    - ``"flow_grpo"`` (arXiv 2505.05470): mean = x - (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dt,
      std = s sqrt(dt), s = a sqrt(sigma / (1 - sigma)); at sigma = 1 the denominator is
      1 - sigma'.
    - ``"dance"`` (DanceGRPO, arXiv 2505.07818): the same with s = a.
    - ``"cps"``: std = sigma' sin(pi a / 2),
      mean = (1 - sigma') (x - sigma v) + sqrt(sigma'^2 - std^2) (x + (1 - sigma) v).

    The log-probability is that of a Gaussian, averaged over the D dimensions of a latent:
    -sum (next - mean)^2 / (2 std^2 D) - log std - log sqrt(2 pi); for ``"cps"``, as its authors do,
    -sum (next - mean)^2 / D. It is that of ``next`` as returned, rounded to its dtype: scoring it
    again gives the same bits, so that the ratio of an unchanged policy is exactly 1.

    Args:
        velocity: [B, ...], what the model predicts. float64, float32, bfloat16 or float16.
        sample: the shape of ``velocity``; its dtype may be another.
        sigma: 0 < sigma <= 1, of every row [B] or one for all.
        sigma_next: 0 <= sigma_next < sigma, likewise.
        schedule: which SDE.
        noise_level: a of the formulas (Flow-GRPO 0.7, DanceGRPO 0.25 to 0.3). 0 makes a step of
            the ODE: next = mean. A step without noise has no density; its log-probability is 0
            and carries no gradient, but for ``"cps"``, where the formula above holds.
        previous: score this sample instead of drawing one.
        seed: key of the random numbers, an int64 number or tensor of one element.
        offset: which draw of a row this is (the number of the step), 0 <= offset < 2^32.
        row_ids: int64 [B], the number of each row's random stream; its place in the batch by
            default. Rows of one id, seed and offset get the same noise.

    Returns:
        ``FlowStep(next, logprob, mean, std)``. All but ``next`` are float32, or float64 if a tensor
        is; all arithmetic is too (the noise itself is always float32). ``std`` is the real one:
        Flow-GRPO's public function leaves sqrt(dt) out of what it returns.

        Gradients flow to ``velocity``, from ``logprob`` and ``mean``. ``next`` is a sample: a
        constant, as are ``sample``, the sigmas and ``previous``. The bits of a row depend on the
        row, its id, seed and offset alone: not on batch, threads or instruction set; the CUDA
        kernel is written to give those of the CPU.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, or, on the CPU, sigmas out of
            range, in one line. On CUDA, where looking would wait for the device, a row whose sigmas
            are out of range gets NaN and an assertion fails on the device.
    """
    now, then, key, count = _check(
        velocity, sample, sigma, sigma_next, schedule, noise_level, previous, seed, offset, row_ids
    )
    if not _library.has_kernels(sample):
        return _reference(
            velocity, sample, now, then, schedule, noise_level, previous, key, count, row_ids
        )
    fixed = None if previous is None else previous.detach()
    inputs = (velocity, sample.detach(), now, then, fixed, key, count, row_ids)
    options = {"schedule": schedule, "noise_level": noise_level}
    eager = torch.is_grad_enabled() and velocity.requires_grad and not torch.compiler.is_compiling()
    try:
        if eager:
            drawn, logprob, mean, std = _Eager.apply(options, *inputs)
        else:
            drawn, logprob, mean, std = torch.ops.rlir.flow_sde_step.default(*inputs, **options)
    except RuntimeError as error:
        if str(error).startswith("flow_sde_step: "):  # what only a look at the values can tell
            raise InputError(str(error).splitlines()[0]) from None
        raise
    return FlowStep(drawn.detach() if previous is None else previous, logprob, mean, std.detach())


def flow_sde_step_reference(
    velocity: Tensor,
    sample: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    schedule: FlowSchedule = "flow_grpo",
    noise_level: float,
    previous: Tensor | None = None,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    row_ids: Tensor | None = None,
) -> FlowStep:
    """``flow_sde_step`` in plain PyTorch, on any device: what the kernels are held to.

    The noise is computed in float64 and rounded to float32.
    """
    now, then, key, count = _check(
        velocity, sample, sigma, sigma_next, schedule, noise_level, previous, seed, offset, row_ids
    )
    return _reference(
        velocity, sample, now, then, schedule, noise_level, previous, key, count, row_ids
    )


def _reference(
    velocity: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    schedule: str,
    noise_level: float,
    previous: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    row_ids: Tensor | None,
) -> FlowStep:
    double = torch.float64 in (velocity.dtype, sample.dtype)
    dtype = torch.float64 if double else torch.float32
    cx, cv, std, precision, constant = _coefficients(
        sigma.double(), sigma_next.double(), schedule, noise_level
    )
    b, wide = len(sample), (-1,) + (1,) * (sample.dim() - 1)
    x = sample.detach().to(dtype)
    mean = cx.to(dtype).view(wide) * x + cv.to(dtype).view(wide) * velocity.to(dtype)
    if previous is None:
        ids = torch.arange(b, device=sample.device) if row_ids is None else row_ids
        noise = normals(seed, offset, ids, x[0].numel() if b else 0).view(x.shape).to(dtype)
        drawn = mean.detach() + std.to(dtype).view(wide) * noise
        reached = drawn.to(sample.dtype)
    else:
        reached = previous
    squares = (reached.detach().to(dtype) - mean).square().flatten(1).mean(1)
    logprob = -precision.to(dtype) * squares - constant.to(dtype)
    return FlowStep(reached, logprob, mean, std.to(dtype))


def _coefficients(
    sigma: Tensor, sigma_next: Tensor, schedule: str, a: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the sample, of the velocity, deviation, and of the log-probability; float64 [B] each."""
    if schedule == "cps":
        std = sigma_next * math.sin(math.pi * a / 2)
        kept = ((sigma_next - std) * (sigma_next + std)).sqrt()
        cv = kept * (1 - sigma) - (1 - sigma_next) * sigma
        return (1 - sigma_next) + kept, cv, std, torch.ones_like(std), torch.zeros_like(std)
    dt = sigma - sigma_next
    if schedule == "dance":
        s = torch.full_like(sigma, a)
    else:
        s = a * (sigma / (1 - torch.where(sigma < 1, sigma, sigma_next))).sqrt()
    drift, std = s.square() / (2 * sigma), s * dt.sqrt()
    precision = torch.where(std > 0, 1 / (2 * std.square()), 0)
    constant = torch.where(std > 0, std.log() + 0.5 * math.log(2 * math.pi), 0)
    return 1 - drift * dt, -(1 + drift * (1 - sigma)) * dt, std, precision, constant


def _check(
    velocity: Tensor,
    sample: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    schedule: str,
    noise_level: float,
    previous: Tensor | None,
    seed: int | Tensor,
    offset: int | Tensor,
    row_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op, device = "flow_sde_step", sample.device
    if sample.dim() == 0:
        raise InputError(f"{op}: sample must have rows, got shape ()")
    for name, x in (("sample", sample), ("velocity", velocity), ("previous", previous)):
        if x is None:
            continue
        if x.dtype not in _DTYPES:
            raise InputError(
                f"{op}: {name} must be float64, float32, bfloat16 or float16, got {x.dtype}"
            )
        if x.shape != sample.shape:
            raise InputError(
                f"{op}: {name} must have the shape of sample, {tuple(sample.shape)}, "
                f"got {tuple(x.shape)}"
            )
        if x.device != device:
            raise InputError(f"{op}: {name} must be on {device}, got {x.device}")
    if sample.shape[1:].numel() == 0:
        raise InputError(
            f"{op}: sample must have an element a row, got shape {tuple(sample.shape)}"
        )
    if schedule not in _SCHEDULES:
        raise InputError(f"{op}: schedule must be 'flow_grpo', 'dance' or 'cps', got {schedule!r}")
    if not 0 <= noise_level < math.inf:
        raise InputError(f"{op}: noise_level must be finite and >= 0, got {noise_level}")
    if schedule == "cps" and noise_level > 1:
        raise InputError(f"{op}: noise_level must be at most 1 for 'cps', got {noise_level}")
    b = sample.shape[0]
    sigmas = []
    for name, value in (("sigma", sigma), ("sigma_next", sigma_next)):
        if not isinstance(value, Tensor):
            value = torch.full((b,), value, dtype=torch.float64, device=device)
        if value.dtype not in _DTYPES:
            raise InputError(
                f"{op}: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}"
            )
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != b):
            raise InputError(f"{op}: {name} must have shape () or ({b},), got {tuple(value.shape)}")
        if value.device != device:
            raise InputError(f"{op}: {name} must be on {device}, got {value.device}")
        sigmas.append(value.detach().expand(b))
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _check_sigmas(*sigmas)
    numbers = []
    for name, number in (("seed", seed), ("offset", offset)):
        if not isinstance(number, Tensor):
            if name == "offset" and not 0 <= number < 2**32:
                raise InputError(f"{op}: offset must be >= 0 and below 2^32, got {number}")
            if not -(2**63) <= number < 2**63:
                raise InputError(f"{op}: {name} must be an int64, got {number}")
            number = torch.full((), number, dtype=torch.int64, device=device)
        if number.dtype != torch.int64 or number.numel() != 1:
            raise InputError(
                f"{op}: {name} must be one int64, got {number.numel()} of {number.dtype}"
            )
        if number.device != device:
            raise InputError(f"{op}: {name} must be on {device}, got {number.device}")
        numbers.append(number)
    if row_ids is not None:
        if row_ids.dtype != torch.int64:
            raise InputError(f"{op}: row_ids must be torch.int64, got {row_ids.dtype}")
        if row_ids.shape != (b,):
            raise InputError(f"{op}: row_ids must have shape ({b},), got {tuple(row_ids.shape)}")
        if row_ids.device != device:
            raise InputError(f"{op}: row_ids must be on {device}, got {row_ids.device}")
    return sigmas[0], sigmas[1], numbers[0], numbers[1]


def _check_sigmas(sigma: Tensor, sigma_next: Tensor) -> None:
    for now, then in zip(sigma.tolist(), sigma_next.tolist(), strict=True):
        if not 0 < now <= 1:
            raise InputError(f"flow_sde_step: sigma must be above 0 and at most 1, got {now:g}")
        if not 0 <= then < now:
            raise InputError(
                f"flow_sde_step: sigma_next must be >= 0 and below sigma, got {then:g} after "
                f"{now:g}"
            )


if _library.PATH is not None:

    @torch.library.register_fake("rlir::flow_sde_step")
    def _fake(
        velocity: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        previous: Tensor | None,
        seed: Tensor,
        offset: Tensor,
        row_ids: Tensor | None = None,
        *,
        schedule: str,
        noise_level: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        double = torch.float64 in (velocity.dtype, sample.dtype)
        dtype = torch.float64 if double else torch.float32
        row = sample.new_empty(sample.shape[0], dtype=dtype)
        drawn = sample.new_empty(sample.shape if previous is None else (0,))
        return drawn, row, sample.new_empty(sample.shape, dtype=dtype), torch.empty_like(row)

    @torch.library.register_fake("rlir::flow_sde_step_backward")
    def _fake_backward(
        dlogprob: Tensor | None,
        dmean: Tensor | None,
        reached: Tensor,
        mean: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        schedule: str,
        noise_level: float,
    ) -> Tensor:
        return torch.empty_like(mean, memory_format=torch.contiguous_format)

    def _setup_context(
        ctx: torch.autograd.function.FunctionCtx,
        inputs: tuple[Tensor, ...],
        keyword_only_inputs: dict[str, object],
        output: tuple[Tensor, ...],
    ) -> None:
        velocity, _, sigma, sigma_next, previous = inputs[:5]
        drawn, _, mean, _ = output
        ctx.options = keyword_only_inputs  # type: ignore[attr-defined]
        ctx.dtype = velocity.dtype  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        reached = drawn if previous is None else previous
        ctx.save_for_backward(reached, mean, sigma, sigma_next)

    def _backward(
        ctx: torch.autograd.function.FunctionCtx,
        dnext: Tensor | None,
        dlogprob: Tensor | None,
        dmean: Tensor | None,
        dstd: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        reached, mean, sigma, sigma_next = ctx.saved_tensors  # type: ignore[attr-defined]
        if dlogprob is None and dmean is None:
            return (None,) * 8
        dvelocity = torch.ops.rlir.flow_sde_step_backward.default(
            dlogprob,
            dmean,
            reached,
            mean,
            sigma,
            sigma_next,
            **ctx.options,  # type: ignore[attr-defined]
        )
        return (dvelocity.to(ctx.dtype), *(None,) * 7)  # type: ignore[attr-defined]

    torch.library.register_autograd("rlir::flow_sde_step", _backward, setup_context=_setup_context)

    class _Eager(torch.autograd.Function):
        """The same without the glue of register_autograd, whose time is quadratic in arguments."""

        @staticmethod
        def forward(ctx: Any, options: dict[str, Any], *inputs: Tensor) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():  # as register_autograd's own forward does
                output = torch.ops.rlir.flow_sde_step.default(*inputs, **options)
            _setup_context(ctx, inputs, options, output)
            ctx.mark_non_differentiable(output[0], output[3])
            return tuple(output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *_backward(ctx, *grads))
