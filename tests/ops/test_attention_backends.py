"""attention_backend: which code computes video_attention, and the calls of flash-attn and xformers.

No GPU is here, so the libraries are stand-ins: modules that do in plain PyTorch what the libraries
document, and refuse what they refuse. What is tested is the choice and that the calls mean the same
as video_attention: layouts, alignment, windows, scale, lse, gradients.

A long file: the stand-ins stand beside what they are for.
"""

import math
import sys
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import BF16, FLOAT, Inputs, inputs, outputs
from row_cases import LAYOUTS, laid_out
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import (
    Mask,
    _attention_backends,
    attention_backend,
    causal,
    diagonal,
    frame_causal,
    video_attention,
    video_attention_reference,
)
from rlir.ops._attention_backends import LIBRARIES, NAMES, decide

libraries = pytest.mark.parametrize("library", LIBRARIES)
PLAIN = {
    "kernels": True,
    "device": "cuda",
    "dtype": BF16,
    "head_size": 64,
    "mask": causal(),
    "plain": True,
    "gradients": False,
    "lse": False,
}
"""What both libraries can do."""


# --- The choice ----------------------------------------------------------------------------------


def reasons_against(library: str, o: dict[str, Any]) -> Iterator[str]:
    """Why a library does not serve, one by one from its documentation."""
    window = o["mask"].kind == "causal" and o["mask"].numbers[0] > 0
    if o["device"] != "cuda":
        yield "CUDA only"
    if o["dtype"] != BF16:
        yield "float32 and float64: not in flash-attn; float16: video_attention's reference"
    if o["mask"].kind != "causal":
        yield "masks of frames"
    if not o["plain"]:
        yield "positions, lengths, queries that see nothing"
    if o["head_size"] not in range(8, 257 if library == "flash-attn" else 129, 8):
        yield "head size"
    if library == "flash-attn" and o["lse"] and o["gradients"]:
        yield "its backward ignores the gradient of lse"
    if library == "xformers" and o["lse"]:
        yield "lse is in another function, without gradients"
    if library == "xformers" and window and o["gradients"]:
        yield "windows have a backward only where xformers was built with flash-attn"


def test_every_combination() -> None:
    choices = {
        "kernels": (True, False),
        "device": ("cuda", "cpu", "meta"),
        "dtype": (BF16, FLOAT, torch.float16, torch.float64),
        "head_size": (1, 20, 32, 64, 128, 136, 256, 264),
        "mask": (causal(), causal(1), causal(70), frame_causal(4), diagonal(2, 2, 1)),
        "plain": (True, False),
        "gradients": (True, False),
        "lse": (True, False),
    }
    subsets = ((), ("flash-attn",), ("xformers",), ("flash-attn", "xformers"))
    seen = set()
    for values in product(*choices.values()):
        o = dict(zip(choices, values, strict=True))
        able = [x for x in LIBRARIES if not list(reasons_against(x, o))]
        own = "rlir" if o["kernels"] else "reference"
        for name, available in product(NAMES, subsets):
            there = [x for x in able if x in available]
            if name == "auto":
                expected = own if o["kernels"] else (*there, own)[0]
            else:
                expected = name if name in there else own
            assert decide(name, available, **o) == expected, (name, available, o)
            seen.add(expected)
    assert seen == {"rlir", "reference", *LIBRARIES}


def test_auto_takes_the_kernels_then_the_libraries_in_order() -> None:
    both = tuple(LIBRARIES)
    without = {**PLAIN, "kernels": False}
    assert decide("auto", both, **PLAIN) == "rlir"
    assert decide("auto", both, **without) == "flash-attn"
    assert decide("auto", both, **{**without, "lse": True, "gradients": True}) == "reference"
    assert decide("auto", ("xformers",), **without) == "xformers"
    assert decide("auto", (), **without) == "reference"
    assert decide("rlir", both, **without) == "reference"


# --- Setting it ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is there but what a test puts there."""
    for name in ("flash_attn", "xformers", "xformers.ops", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, None)
    _attention_backends.problem_of.cache_clear()
    yield
    _attention_backends.problem_of.cache_clear()
    assert _attention_backends.chosen() == "auto", "a test left its choice behind"


def test_sets_and_goes_back(stand_ins: None) -> None:
    with attention_backend("rlir"):
        assert _attention_backends.chosen() == "rlir"
        with pytest.raises(ZeroDivisionError), attention_backend("flash-attn"):
            _attention_backends.chosen().index("flash-attn") / 0
        assert _attention_backends.chosen() == "rlir"
    attention_backend("xformers")
    assert _attention_backends.chosen() == "xformers"
    attention_backend("auto")


@libraries
def test_an_absent_library_is_one_line(library: str) -> None:
    with pytest.raises(InputError) as caught:
        attention_backend(library)
    line = str(caught.value)
    assert line.startswith(f"attention_backend: {library} must be installed, got ")
    assert line.endswith(": pip install 'rlir[gpu]'")
    assert len(line.splitlines()) == 1


def test_an_old_or_hollow_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    with pytest.raises(InputError, match="has no attribute 'flash_attn_func': pip"):
        attention_backend("flash-attn")
    module.flash_attn_func = flash_attn_func
    for version, got in (("2.0.9", "2.0.9"), ("1.0.9", "1.0.9"), (None, "an unknown version")):
        module.__version__ = version or ""
        _attention_backends.problem_of.cache_clear()
        with pytest.raises(InputError, match=f"flash-attn must be 2.3 or later, got {got}: pip"):
            attention_backend("flash-attn")
    for version in ("2.3.0", "2.8.3.post2", "2.10", "3.0.0b1"):
        module.__version__ = version
        _attention_backends.problem_of.cache_clear()
        assert _attention_backends.problem_of("flash-attn") is None


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(InputError, match="must be one of auto, rlir, flash-attn, xformers, got 'f"):
        attention_backend("fa3")


# --- Stand-ins -----------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v [B, T, H, D], as many heads everywhere; lse [B, H, Tq]. What is not seen is
    multiplied by 0, as in the libraries: NaN stays NaN."""
    z = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    z = z.masked_fill(~seen, -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", z.softmax(-1), v.float())
    return out.to(q.dtype), z.logsumexp(-1)


def assert_loads_16_bytes(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        if torch.compiler.is_compiling():
            continue
        assert all(s % 8 == 0 for s in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """By the docstring of flash-attn 2.8: bottom right, window ends inclusive, native GQA."""
    assert dropout_p == 0
    assert softmax_scale is not None
    assert_loads_16_bytes(q, k, v)
    tq, tk = q.shape[1], k.shape[1]
    i, j = torch.arange(tq)[:, None] + tk - tq, torch.arange(tk)
    left, right = window_size
    right = 0 if causal else right
    seen = torch.ones(tq, tk, dtype=torch.bool)
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    ratio = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(ratio, 2) for x in (k, v))
    out, lse = attend(q, k, v, seen, softmax_scale)
    return (out, lse.detach(), None) if return_attn_probs else out


class LowerTriangularFromBottomRightMask:
    """By its docstring: no key nearer the last key than the query is to the last query."""

    def seen(self, tq: int, tk: int) -> Tensor:
        return torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)


class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """By its docstring: nor a key that is the window or farther from it."""

    def __init__(self, window: int):
        assert window > 0
        self.window = window

    def seen(self, tq: int, tk: int) -> Tensor:
        return super().seen(tq, tk).triu(tk - tq - self.window + 1)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> Tensor:
    """By the documentation of xformers 0.0.34: grouped heads and windows forward only."""
    gradients = query.requires_grad or key.requires_grad or value.requires_grad
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    assert scale is not None
    assert_loads_16_bytes(query, key, value)
    if gradients and (query.dim() == 5 or hasattr(attn_bias, "window")):
        raise NotImplementedError("No operator found for `memory_efficient_attention_backward`")
    seen = attn_bias.seen(query.shape[1], key.shape[1])
    if query.dim() == 4:
        return attend(query, key, value, seen, scale)[0]
    flat = [x.flatten(2, 3) for x in (query, key, value)]
    return attend(*flat, seen, scale)[0].unflatten(2, query.shape[2:4])


def modules() -> dict[str, ModuleType]:
    names = ("flash_attn", "xformers", "xformers.ops", "xformers.ops.fmha")
    made = {name: ModuleType(name) for name in (*names, "xformers.ops.fmha.attn_bias")}
    for name, module in made.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    made["flash_attn"].__version__ = "2.8.3"
    made["flash_attn"].flash_attn_func = flash_attn_func
    made["xformers.ops.fmha"].memory_efficient_attention = memory_efficient_attention
    for mask in (
        LowerTriangularFromBottomRightMask,
        LowerTriangularFromBottomRightLocalAttentionMask,
    ):
        setattr(made["xformers.ops.fmha.attn_bias"], mask.__name__, mask)
    return made


@pytest.fixture
def stand_ins(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def as_on_cuda(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors of the CPU are decided upon as if they were bfloat16 on a GPU. Returns what is
    decided, call by call."""
    decided: list[str] = []

    def as_if(*args: Any, **options: Any) -> str:
        options |= {"device": "cuda", "dtype": BF16}
        decided.append(decide(*args, **options))
        return decided[-1]

    monkeypatch.setattr(_attention_backends, "decide", as_if)
    monkeypatch.setattr(_attention_backends, "_available", lambda *_: tuple(LIBRARIES))
    return decided


# --- The calls -----------------------------------------------------------------------------------


def compare(library: str, x: Inputs, decided: list[str], *, lse: bool, gradients: bool) -> None:
    """video_attention by a library beside the reference, in x's dtype."""
    tensors = [t.clone().requires_grad_(gradients) for t in (x.q, x.k, x.v)]
    same = [t.clone().requires_grad_(gradients) for t in (x.q, x.k, x.v)]
    with attention_backend(library):
        got = video_attention(*tensors, **x.options, return_lse=lse)
    assert decided.pop() == library
    expected = video_attention_reference(*same, **x.options, return_lse=lse)
    close = {"rtol": 1e-5, "atol": 1e-5} if x.q.dtype == FLOAT else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(got, expected, **close)
    if gradients:
        grads = torch.autograd.grad(got, tensors, x.d_out)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, same, x.d_out), **close)


@libraries
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (37, 37), (5, 50), (1, 40)])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_means_the_same(
    library: str,
    heads: tuple[int, int],
    tq: int,
    tk: int,
    gradients: bool,
    dtype: torch.dtype,
    as_on_cuda: list[str],
) -> None:
    x = inputs(2, tq, tk, heads, 32, dtype, mask=causal(), scale=0.3)
    compare(library, x, as_on_cuda, lse=False, gradients=gradients)
    x.options.pop("scale")
    compare(library, x, as_on_cuda, lse=False, gradients=gradients)


@libraries
@pytest.mark.parametrize("window", [1, 2, 7, 36, 37, 2**31 - 1])
@pytest.mark.parametrize("tq", [1, 11, 37])
def test_windows(library: str, window: int, tq: int, as_on_cuda: list[str]) -> None:
    x = inputs(2, tq, 37, (4, 2), 32, mask=causal(window))
    compare(library, x, as_on_cuda, lse=False, gradients=library == "flash-attn")
    # What no query sees has no influence, even if it is NaN.
    first = max(0, 37 - tq - window + 1)
    x.k[:, :first], x.v[:, :first] = math.nan, math.nan
    compare(library, x, as_on_cuda, lse=False, gradients=library == "flash-attn")


@pytest.mark.parametrize("mask", [causal(), causal(7)])
def test_lse_of_flash_attn(mask: Mask, as_on_cuda: list[str]) -> None:
    x = inputs(2, 11, 37, (6, 2), 32, mask=mask)
    compare("flash-attn", x, as_on_cuda, lse=True, gradients=False)


@libraries
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(library: str, layout: str, as_on_cuda: list[str]) -> None:
    x = inputs(2, 9, 20, (4, 2), 32, mask=causal())
    q, k, v = (laid_out(t, layout) for t in (x.q, x.k, x.v))
    shifted = torch.cat([k[..., :3], k], -1)[..., 3:]  # begins amid 16 bytes
    expected = video_attention_reference(x.q, x.k, x.v, mask=causal())
    with attention_backend(library):
        for keys in (k, shifted):
            got = video_attention(q, keys, v, mask=causal())
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert as_on_cuda == [library] * 2


def test_slices_of_a_fused_projection_are_not_copied() -> None:
    k = torch.empty(2, 9, 12, 32, dtype=BF16)[:, :, 4:8]
    assert _attention_backends._aligned(k) is k


@libraries
def test_what_a_library_cannot_do_is_rlirs(library: str, as_on_cuda: list[str]) -> None:
    lengths = torch.tensor([3, 9])
    cases = [
        inputs(2, 9, 9, d=32, mask=frame_causal(4)),
        inputs(2, 9, 9, d=32, mask=causal(), k_lengths=lengths),
        inputs(2, 9, 9, d=32, mask=causal(), q_positions=torch.arange(9)),
        inputs(2, 9, 7, d=32, mask=causal()),  # the first queries see nothing
        inputs(0, 9, 9, d=32, mask=causal()),
        inputs(2, 9, 9, d=20, mask=causal()),
        inputs(2, 9, 9, d=32, mask=causal()),  # its lse and the gradient of that
    ]
    own = "rlir" if _library.PATH else "reference"
    for x in cases:
        with attention_backend(library):
            got = outputs(video_attention, x)
        torch.testing.assert_close(got, outputs(video_attention, x), rtol=0, atol=0)
    assert as_on_cuda[: 2 * len(cases)] == [own] * 2 * len(cases)


@libraries
def test_the_cpu_is_not_concerned(library: str, stand_ins: None) -> None:
    x = inputs(2, 9, 9, d=32, dtype=BF16, mask=causal())
    expected = outputs(video_attention, x)
    with attention_backend(library):
        assert _attention_backends.backend_of(x.q, x.k, x.v, causal(), True, False) in (
            "rlir",
            "reference",
        )
        got = outputs(video_attention, x)
    for a, b in zip(got, expected, strict=True):
        assert a.equal(b)


def test_libraries_are_found_and_what_rules_them_out(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCuda:
        is_cuda, device = True, "cuda:0"

    class Properties:
        major = 9

    def available(kernels: bool = True, gradients: bool = False) -> tuple[str, ...]:
        return _attention_backends._available(OnCuda(), kernels, gradients)

    monkeypatch.setattr(_library, "FORCE_REFERENCE", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert available(kernels=True) == (), "auto asks for no library where there are kernels"
    assert available(kernels=False) == tuple(LIBRARIES)
    with attention_backend("rlir"):
        assert available(kernels=False) == ()
    with attention_backend("xformers"):
        assert available(gradients=True) == tuple(LIBRARIES)
        torch.use_deterministic_algorithms(True)
        try:
            assert available(gradients=True) == ()
            assert available() == tuple(LIBRARIES)
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(Properties, "major", 7)
        assert available() == (), "no bfloat16 before compute capability 8.0"
        monkeypatch.setattr(Properties, "major", 8)
        monkeypatch.setattr(_library, "FORCE_REFERENCE", True)
        assert available() == ()


@libraries
def test_compiles_and_follows_the_choice(
    library: str, as_on_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def available(q: Tensor, kernels: bool, gradients: bool) -> tuple[str, ...]:
        if gradients and torch.are_deterministic_algorithms_enabled():
            return ()
        return _attention_backends.installed()

    monkeypatch.setattr(_attention_backends, "_available", available)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return video_attention(q, k, v, mask=causal())

    x = inputs(2, 9, 20, (4, 2), 32, mask=causal())
    expected = video_attention_reference(x.q, x.k, x.v, mask=causal())
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    for name in ("rlir", library):
        with attention_backend(name):
            got = call(*leaves)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.autograd.grad(got.sum(), leaves)
        assert as_on_cuda[-1] == (name if name != "rlir" or _library.PATH else "reference")
