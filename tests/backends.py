"""The backends an op can run on, for tests: one parametrisation over all of them.

``reference`` is the plain PyTorch function; ``cpu-<set>`` the native kernel of each instruction
set this machine has, ``cpu-amx`` also where its tiles have to be emulated; ``emu`` the CUDA kernel
in the emulator, ``emu-checked`` the same with the detector of races and wrong accesses, in another
order of threads; ``cuda`` a real GPU, skipped where there is none. In tests/ops/test_<op>.py:

    backends = backends_of(my_op, my_op_reference)

    @backends
    def test_something(op: Backend) -> None:
        assert op(x)...

An op without a CUDA kernel (csrc/cuda/ops.cmake) leaves out the last three by itself, one without
a build for AMX ``cpu-amx``. ``op`` calls the public function, so checks, strides and autograd go
the whole way. Where a gradient is wanted, put call and backward into ``with op.active():``, which
holds the backend in place.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from amxcheck import emulator as amx
from cudacheck.emulator import cuda_ops, emulated
from torch import Tensor

from rlir import _build_info, _library

needs_amx = pytest.mark.skipif(amx.missing() != "", reason=amx.missing())


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """CPU kernels of one instruction set, or a lower one that this process is held to."""
    with amx.tiles() if name == "amx" else contextlib.nullcontext():
        before = torch.ops.rlir.cap_cpu_isa(name)
        try:
            yield
        finally:
            torch.ops.rlir.cap_cpu_isa(before)


def _moved(value: Any, device: str) -> Any:
    """Tensors of an argument or result on another device, under the same strides."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return dataclasses.replace(value, **{n: _moved(getattr(value, n), device) for n in names})
    if isinstance(value, tuple | list):
        moved = [_moved(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


@dataclasses.dataclass(frozen=True)
class Backend:
    """An op on one backend: called like the public function."""

    name: str
    function: Callable[..., Any]

    @property
    def is_reference(self) -> bool:
        return self.name == "reference"

    @property
    def is_emulated(self) -> bool:
        """Whether CUDA is emulated."""
        return self.name.startswith("emu")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Ops called in this context, and their backward, run on this backend."""
        kind, _, which = self.name.partition("-")
        with contextlib.ExitStack() as stack:
            if kind == "cpu":
                stack.enter_context(instruction_set(which))
            elif kind == "emu":
                stack.enter_context(
                    emulated("checked", "random", seed=3) if which else emulated("plain")
                )
            yield

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.name == "cuda":
            args = tuple(_moved(a, "cuda") for a in args)
            options = {k: _moved(v, "cuda") for k, v in options.items()}
            return _moved(self.function(*args, **options), "cpu")
        with self.active():
            return self.function(*args, **options)


def instruction_sets() -> list[str]:
    """Those that are compiled and that this machine has."""
    best = _library.CPU_ISAS.index(_build_info.detected_cpu_isa())
    return [isa for isa in _build_info.cpu_isas if _library.CPU_ISAS.index(isa) <= best]


def instruction_sets_and_amx() -> list[ParameterSet]:
    """Those and amx, for pytest.mark.parametrize: skipped where its tiles cannot be emulated."""
    names = [pytest.param(isa, id=isa) for isa in instruction_sets() if isa != "amx"]
    return [*names, pytest.param("amx", marks=needs_amx, id="amx")]


def native_backends(op: Callable[..., Any]) -> list[ParameterSet]:
    """The best CPU kernels of this machine, and those for AMX if the op has such a build."""
    names = [[isa for isa in instruction_sets() if isa != "amx"][-1]]
    names += ["amx"] * (op.__name__ in amx.amx_ops())
    return [parameter(Backend(f"cpu-{name}", op)) for name in names]


def parameter(backend: Backend) -> ParameterSet:
    """For pytest.mark.parametrize: skipped where the backend cannot run."""
    marks: list[pytest.MarkDecorator] = []
    if backend.name == "cuda":
        no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        marks = [pytest.mark.gpu, no_gpu]
    elif backend.name == "cpu-amx":
        marks = [needs_amx]
    return pytest.param(backend, marks=marks, id=backend.name)


def all_backends(op: Callable[..., Any], reference: Callable[..., Any]) -> list[Backend]:
    """Every backend of an op, whether or not it can run here."""
    found = [Backend("reference", reference)]
    found += [Backend(f"cpu-{isa}", op) for isa in instruction_sets() if isa != "amx"]
    if op.__name__ in amx.amx_ops():
        found.append(Backend("cpu-amx", op))
    if op.__name__.rstrip("_") in cuda_ops():  # a name that ends in _ writes in place
        found += [Backend(name, op) for name in ("emu", "emu-checked", "cuda")]
    return found


def backends_of(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    only: Callable[[Backend], bool] = lambda backend: True,
) -> pytest.MarkDecorator:
    """Parametrises the argument ``op`` of a test over the backends of an op."""
    chosen = [b for b in all_backends(op, reference) if only(b)]
    return pytest.mark.parametrize("op", [parameter(b) for b in chosen])
