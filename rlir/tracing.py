"""Spans for profilers: a torch.profiler range and, where the package is there, an NVTX range."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

try:
    import nvtx as _nvtx
except ImportError:  # an optional package; torch.profiler ranges remain
    _nvtx = None

DOMAIN = "rlir"


@contextmanager
def span(name: str, size: int | None = None) -> Iterator[None]:
    """A named range around a phase or an op. ``size`` is the NVTX payload (rows, tokens)."""
    if _nvtx is None:
        with record_function(f"rlir.{name}"):
            yield
        return
    with record_function(f"rlir.{name}"), _nvtx.annotate(name, domain=DOMAIN, payload=size):
        yield
