"""sample_tokens: registration (opcheck, torch.compile) and what it says to wrong inputs."""

import math

import pytest
import torch
from backends import Backend, backends_of
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import sample_tokens, sample_tokens_reference

RAW = torch.ops.rlir.sample_tokens.default

backends = backends_of(sample_tokens, sample_tokens_reference)
CHECKED = Backend("emu-checked", sample_tokens)


def logits_of(n: int, v: int) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(0)) * 2.5


# --- Registration --------------------------------------------------------------------------------


def test_opcheck() -> None:
    x = logits_of(5, 40)
    calls: list[tuple[tuple, dict]] = [
        ((x,), {"seed": 3, "offset": 1}),
        ((x.bfloat16(), torch.arange(5), torch.tensor(1), torch.tensor([2])), {"top_p": 0.5}),
        ((x.t().contiguous().t(),), {"top_k": 3, "low": 2, "high": 30, "return_support": True}),
        ((x[:0],), {"min_p": 0.1}),
    ]
    for args, options in calls:
        torch.library.opcheck(RAW, args, options)


def test_compiles_once_for_all_sizes() -> None:
    def step(x: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        return sample_tokens(x * 2, seed=1, offset=offset, top_p=0.9, return_support=True)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, v, stance in ((6, 40, "default"), (11, 90, "fail_on_recompile")):
        x = logits_of(n, v)
        with torch.compiler.set_stance(stance):
            for offset in (torch.tensor(3), torch.tensor(4)):
                for a, b in zip(compiled(x, offset), step(x, offset), strict=True):
                    assert a.equal(b)


# --- Errors --------------------------------------------------------------------------------------

X = torch.zeros(3, 10)
KEYS = {"seed": 0, "offset": 0}
NAN, INF, NOTHING = X.clone(), X.clone(), X.clone()
NAN[1, 3], INF[2, 0], NOTHING[1:] = math.nan, math.inf, -math.inf
MAXIMUM = (
    "logits must have a finite largest value in vocab_range and no NaN, got otherwise in row {}"
)
HOSTILE: list[tuple[tuple, dict, str]] = [
    ((X.double(),), {}, "logits must be float32 or bfloat16, got torch.float64"),
    ((X[0],), {}, "logits must be [N, V], got shape (10,)"),
    ((X,), {"temperature": -1.0}, "temperature must be finite and > 0, got -1.0"),
    ((X,), {"temperature": math.nan}, "temperature must be finite and > 0, got nan"),
    (
        (X,),
        {"vocab_range": (0, 11)},
        "vocab_range must satisfy 0 <= low < high <= 10, got (0, 11)",
    ),
    ((X,), {"top_k": -1}, "top_k must be >= 1 or None, got -1"),
    ((X,), {"top_p": 1.1}, "top_p must be in (0, 1] or None, got 1.1"),
    ((X,), {"min_p": math.nan}, "min_p must be in [0, 1] or None, got nan"),
    ((X,), {"seed": -1}, "seed must be from 0 and below 2^63, got -1"),
    ((X,), {"offset": 2**32}, f"offset must be from 0 and below 2^32, got {2**32}"),
    (
        (X,),
        {"seed": torch.zeros(2)},
        "seed must be an int or an int64 tensor of one element, got torch.float32 of 2",
    ),
    ((X,), {"row_ids": torch.zeros(3)}, "row_ids must be torch.int64, got torch.float32"),
    ((X,), {"row_ids": torch.arange(4)}, "row_ids must be [3], got shape (4,)"),
    ((X,), {"row_ids": torch.arange(3).to("meta")}, "row_ids must be on cpu, got meta"),
    ((NAN,), {}, MAXIMUM.format(1)),
    ((INF,), {"top_p": 0.5}, MAXIMUM.format(2)),
    ((NOTHING,), {"top_k": 2}, MAXIMUM.format(1)),
]


@backends
@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_hostile_inputs(op: Backend, args: tuple, options: dict, message: str) -> None:
    of_values = message.startswith("logits must have a finite")
    if op.name == "cuda" and ("meta" in message or of_values):
        pytest.skip("the message names the device, or comes at the next synchronisation")
    if op.is_emulated and of_values:
        pytest.skip("a kernel cannot say which; see the next test")
    with pytest.raises(InputError) as caught:
        op(*args, **{**KEYS, **options})
    assert str(caught.value) == f"sample_tokens: {message}"


@pytest.mark.parametrize("x", [NAN, INF, NOTHING], ids=["nan", "infinity", "nothing"])
def test_the_cuda_kernel_asserts_what_it_cannot_say(x: Tensor) -> None:
    with pytest.raises(InputError, match="device assertion: sample_tokens: logits must have a fin"):
        CHECKED(x, top_p=0.5, **KEYS)
    with pytest.raises(InputError, match="device assertion: sample_tokens: offset must be from 0"):
        CHECKED(X, seed=0, offset=torch.tensor(-1))


def test_raw_operator_is_safe_from_hostile_inputs() -> None:
    bad: list[tuple[tuple, dict]] = [
        ((X.double(),), {}),
        ((X[0],), {}),
        ((X, torch.arange(4)), {}),
        ((X, None, torch.arange(2)), {}),
        ((X, None, None, torch.zeros(1)), {}),
        ((X,), {"temperature": 0.0}),
        ((X,), {"top_k": 0}),
        ((X,), {"top_p": math.nan}),
        ((X,), {"min_p": 2.0}),
        ((X,), {"low": 3, "high": 3}),
        ((X,), {"low": -1}),
        ((X[:, :0],), {}),
        ((torch.zeros(1, 1).expand(1, 2**22),), {}),
    ]
    for args, options in bad:
        with pytest.raises(RuntimeError, match=r"^sample_tokens: \w+.* must .*, got .*$"):
            RAW(*args, **options)
