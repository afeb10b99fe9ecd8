"""Fakes and gradients of selected_logprob's operators: importing this registers them."""

from typing import Any

import torch
from torch import Tensor

from rlir import _library


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    hidden, weight, targets, bias, support = inputs
    _, entropy, stats = output
    ctx.save_for_backward(hidden, weight, targets, bias, support, entropy, stats)
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
    hidden, weight, targets, bias, support, entropy, stats = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, False, False)  # it leaves out trailing defaults
    if not ctx.options["compute_entropy"]:
        grad_entropy = None
    d_hidden, d_weight, d_bias = torch.ops.rlir.selected_logprob_backward.default(
        grad_logprob,
        grad_entropy,
        hidden,
        weight,
        targets,
        bias,
        support,
        entropy,
        stats,
        temperature=ctx.options["temperature"],
        low=ctx.options["low"],
        high=ctx.options["high"],
        need_hidden=needs[0],
        need_weight=needs[1],
        need_bias=needs[3],
    )
    return (
        d_hidden if needs[0] else None,
        d_weight if needs[1] else None,
        None,
        d_bias.to(bias.dtype) if needs[3] else None,
        None,
    )


if _library.PATH is not None:

    @torch.library.register_fake("rlir::selected_logprob")
    def _fake(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        support: Tensor | None = None,
        *,
        temperature: float = 1.0,
        low: int = 0,
        high: int | None = None,
        compute_entropy: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = hidden.shape[0]
        return (
            hidden.new_empty(n, dtype=torch.float32),
            hidden.new_empty(n if compute_entropy else 0, dtype=torch.float32),
            hidden.new_empty(3, n, dtype=torch.float32),
        )

    @torch.library.register_fake("rlir::selected_logprob_backward")
    def _fake_backward(
        grad_logprob: Tensor | None,
        grad_entropy: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        support: Tensor | None,
        entropy: Tensor,
        stats: Tensor,
        *,
        temperature: float,
        low: int,
        high: int | None,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            hidden.new_empty(hidden.shape if need_hidden else (0,)),
            weight.new_empty(weight.shape if need_weight else (0,)),
            hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
        )

    @torch.library.register_fake("rlir::head_logits")
    def _fake_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)

    @torch.library.register_fake("rlir::selected_support")
    def _fake_support(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        low: int = 0,
        high: int | None = None,
    ) -> Tensor:
        return hidden.new_empty(hidden.shape[0], (weight.shape[0] + 7) // 8, dtype=torch.uint8)

    torch.library.register_autograd("rlir::selected_logprob", _backward, setup_context=_save)
