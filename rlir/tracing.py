"""Spans for profilers: a torch.profiler range and, where a tool listens, an NVTX range.

Every op and every phase of training is a span. A span costs about as much as a function call while
nothing records: whether something does is a flag that torch's profilers set in Python, and whether
NVTX has a listener is settled once, because tools such as Nsight Systems attach at the start of a
process (``docs/profiling.md``).
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.profiler import record_function

try:
    import nvtx
except ImportError:  # an optional package; torch.profiler ranges remain
    nvtx = None

DOMAIN = "rlir"
"""NVTX domain of all spans; torch.profiler shows them as ``rlir.NAME``."""

# A domain that no tool listens to does nothing: then there is no use in calling it.
_domain = None if nvtx is None else nvtx.get_domain(DOMAIN)
if _domain is not None and type(_domain).__name__ == "DummyDomain":
    _domain = None

_IDLE = nullcontext()

P = ParamSpec("P")
R = TypeVar("R")


def span(name: str, size: int | None = None) -> AbstractContextManager[object]:
    """A named range around a phase or an op. ``size`` (rows, tokens) is the NVTX payload."""
    if _domain is None and not profiler._is_profiler_enabled:
        return _IDLE
    return _IDLE if torch.compiler.is_compiling() else _Span(name, size)


def traced(op: Callable[P, R]) -> Callable[P, R]:
    """Make every call of an op a span: its name, the elements of its first tensor."""
    name = op.__name__

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _domain is None and not profiler._is_profiler_enabled:
            return op(*args, **kwargs)
        if torch.compiler.is_compiling():
            return op(*args, **kwargs)
        values = (*args, *kwargs.values())
        size = next((x.numel() for x in values if isinstance(x, Tensor)), None)
        with _Span(name, size):
            return op(*args, **kwargs)

    return call


class _Span:
    """The range itself. Not reentrant: one object is one range."""

    __slots__ = ("name", "range", "size")

    def __init__(self, name: str, size: int | None):
        self.name, self.size = name, size
        self.range = record_function(f"rlir.{name}")

    def __enter__(self) -> None:
        self.range.__enter__()
        if _domain is not None:
            _domain.push_range(_domain.get_event_attributes(message=self.name, payload=self.size))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _domain is not None:
            _domain.pop_range()
        self.range.__exit__(kind, error, trace)


@contextmanager
def clocked(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time of a block to ``seconds[name]``."""
    begin = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - begin
