"""selected_logprob: registration (opcheck, torch.compile) and what it says to wrong inputs."""

import math
from collections.abc import Callable

import pytest
import torch
from selected_logprob_cases import DTYPES, inputs, random_support
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import selected_logprob, selected_logprob_reference

Op = Callable[..., tuple[Tensor, Tensor]]
BACKENDS = {"reference": selected_logprob_reference, "cpu": selected_logprob}

backends = pytest.mark.parametrize("op", BACKENDS.values(), ids=BACKENDS.keys())


# --- Registration --------------------------------------------------------------------------------


def test_opcheck() -> None:
    ops = torch.ops.rlir
    for name, options in (("float32", {}), ("bfloat16", {"low": 3, "high": 33})):
        x = inputs(6, 8, 40, DTYPES[name])
        support = random_support(x) | 1 << 5
        for hidden in (x.hidden, x.hidden[:0], x.hidden.t().contiguous().t()):
            n = len(hidden)
            leaves = (hidden.clone().requires_grad_(), x.weight.clone().requires_grad_())
            bias = x.bias.clone().requires_grad_()
            args = (*leaves, x.targets[:n], bias, support[:n])
            torch.library.opcheck(ops.selected_logprob.default, args, options)
            torch.library.opcheck(
                ops.selected_logprob.default, args[:3], {**options, "compute_entropy": False}
            )
            torch.library.opcheck(ops.head_logits.default, (hidden, x.weight, x.bias))
            torch.library.opcheck(
                ops.selected_support.default, (hidden, x.weight), {"top_p": 0.5, **options}
            )


def test_compiles_once_for_all_sizes() -> None:
    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprob, entropy = selected_logprob(hidden * 2, weight, targets, temperature=0.9)
        return logprob + entropy

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, v, stance in ((6, 40, "default"), (11, 90, "fail_on_recompile")):
        x = inputs(n, 8, v)
        grads = []
        for call in (compiled, step):
            leaves = [x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()]
            with torch.compiler.set_stance(stance):
                out = call(*leaves, x.targets)
                out.backward(x.d_logprob)
            grads.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for a, b in zip(*grads, strict=True):
            assert a.equal(b)


# --- Errors --------------------------------------------------------------------------------------

H, W, T = torch.zeros(3, 4), torch.zeros(10, 4), torch.zeros(3, dtype=torch.int64)
NONE = torch.zeros(3, 2, dtype=torch.uint8)
HOSTILE: list[tuple[tuple, dict, str]] = [
    ((H.half(), W, T), {}, "hidden must be float32, bfloat16 or float64, got torch.float16"),
    ((H[0], W, T), {}, "hidden must be [N, H], got shape (4,)"),
    ((H, W[0], T), {}, "weight must be [V, H], got shape (4,)"),
    ((H, W[:, :3], T), {}, "weight must be [V, 4], got shape (10, 3)"),
    ((H, W[:0], T), {}, "weight must have at least one row, got 0"),
    ((H, W.to("meta"), T), {}, "weight must be on cpu, got meta"),
    ((H, W, T.int()), {}, "targets must be torch.int64, got torch.int32"),
    ((H, W, T[:2]), {}, "targets must be [3], got shape (2,)"),
    ((H, W, T + 10), {}, "targets must be from 0 and below 10, got 10"),
    ((H, W, T - 1), {}, "targets must be from 0 and below 10, got -1"),
    ((H, W, T), {"bias": W[0]}, "bias must be [10], got shape (4,)"),
    ((H, W, T), {"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
    ((H, W, T), {"temperature": 1e-60}, "temperature must be finite and > 0, got 1e-60"),
    ((H, W, T), {"temperature": math.inf}, "temperature must be finite and > 0, got inf"),
    ((H, W, T), {"temperature": math.nan}, "temperature must be finite and > 0, got nan"),
    (
        (H, W, T),
        {"vocab_range": (4, 4)},
        "vocab_range must satisfy 0 <= low < high <= 10, got (4, 4)",
    ),
    ((H, W, T), {"top_k": 0}, "top_k must be >= 1 or None, got 0"),
    ((H, W, T), {"top_p": 0.0}, "top_p must be in (0, 1] or None, got 0.0"),
    (
        (H, W, T),
        {"support": NONE, "top_p": 0.5},
        "support must come without top_k and top_p, got top_p",
    ),
    ((H, W, T), {"support": NONE.int()}, "support must be torch.uint8, got torch.int32"),
    ((H, W, T), {"support": NONE[:, :1]}, "support must be [3, 2], got shape (3, 1)"),
    (
        (H, W, T),
        {"support": NONE | torch.tensor([[1], [0], [1]], dtype=torch.uint8)},
        "support must hold a token of vocab_range in every row, got none in row 1",
    ),
    (
        (H, W, T),
        {"support": NONE + 3, "vocab_range": (2, 8)},
        "support must hold a token of vocab_range in every row, got none in row 0",
    ),
]


@backends
@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_hostile_inputs(op: Op, args: tuple, options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        op(*args, **options)
    assert str(caught.value) == f"selected_logprob: {message}"


def test_raw_operators_are_safe_from_hostile_inputs() -> None:
    ops = torch.ops.rlir
    x = inputs(3, 4, 10)
    bad = [
        lambda: ops.selected_logprob(x.hidden.double(), x.weight, x.targets),
        lambda: ops.selected_logprob(x.hidden, x.weight[:, :2], x.targets),
        lambda: ops.selected_logprob(x.hidden, x.weight, x.targets[:1]),
        lambda: ops.selected_logprob(x.hidden, x.weight, x.targets + 10),
        lambda: ops.selected_logprob(x.hidden, x.weight, x.targets, low=5, high=11),
        lambda: ops.selected_logprob(x.hidden, x.weight, x.targets, x.bias[:3]),
        lambda: ops.selected_logprob(x.hidden, x.weight, x.targets, None, NONE),
        lambda: ops.selected_logprob(x.hidden, x.weight, x.targets, None, NONE.t() + 1),
        lambda: ops.selected_logprob(x.hidden, x.weight, x.targets, temperature=math.nan),
        lambda: ops.selected_support(x.hidden, x.weight, top_p=1.5),
    ]
    for call in bad:
        with pytest.raises(RuntimeError, match=r"^selected_logprob: \w+.* must .*, got .*$"):
            call()
    stats = torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="stats must be what selected_logprob returned"):
        ops.selected_logprob_backward(
            *(x.d_logprob, None, x.hidden, x.weight, x.targets, None, None, stats[0], stats),
            temperature=1.0,
            low=0,
            high=None,
            need_hidden=True,
            need_weight=True,
            need_bias=False,
        )
