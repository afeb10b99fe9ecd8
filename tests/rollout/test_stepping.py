"""Nothing in the loop over steps waits for a device, and a step can be a graph."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import make, prompt, row_ends
from testkit import same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlir import _library
from rlir.rollout import stepping
from rlir.rollout.sampling import Sampling, greedy
from rlir.rollout.schedule import Schedule, diagonal, sequential
from rlir.rollout.stepping import Drawn, Stepper
from rlir.rollout.stepwise import inference_copy

pytestmark = pytest.mark.skipif(_library.PATH is None, reason="references look at values")

SAMPLINGS = {
    "plain": Sampling(temperature=0.85),
    "truncated": Sampling(top_k=9, top_p=0.8, min_p=0.01),
    "greedy": greedy(),
    "greedy, truncated": Sampling(temperature=0.0, top_k=3),
}
samplings = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
SIZES = {"hidden": 128, "heads": 4, "kv_heads": 2, "rows": 3, "columns": 4, "frames": 3}
"""Heads of a size that the CUDA kernels have."""
WAITS = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
)
"""Ops that look at values of the device, or whose result's size depends on them."""


class WaitsError(AssertionError):
    """An op would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Raises where an op would wait for the device that all tensors are taken to be on."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if any(name.strip("_").startswith(word.strip("_")) for word in WAITS):
            raise WaitsError(name)
        if name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise WaitsError(f"{name} of a mask")
        out = func(*args, **(kwargs or {}))
        moved = {x.device.type for x in (*args, out) if isinstance(x, Tensor)}
        if len(moved) > 1 and name in ("copy_", "_to_copy"):
            raise WaitsError(f"{name} between devices")
        return out


def stepper(
    schedule: Schedule, sampling: Sampling, device: str = "cpu", context: int = 2, **more: Any
) -> Stepper:
    model = make(**SIZES)
    policy = inference_copy(model).to(device)
    prompts = [prompt(model, context, 4, seed=i) for i in range(2)]
    plan = schedule.plan(SIZES["rows"], SIZES["columns"])
    blocks = torch.stack([model.action_ids(x.actions) for x in prompts])
    return Stepper(
        *(policy, plan, sampling, torch.stack([x.codes for x in prompts]).to(device)),
        *(blocks.to(device), 3),
        seed=torch.tensor([7]).to(device),
        row_ids=torch.arange(6).to(device),
        **more,
    )


def stepped(loop: Stepper, around: contextlib.AbstractContextManager | None = None) -> Drawn:
    with torch.no_grad():
        loop._prefill()
        with around or contextlib.nullcontext():
            loop.draw()
    return loop.drawn()


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device whose values cannot be looked at: meta tensors, which the ops take for CUDA's."""
    monkeypatch.setattr(_library, "has_kernels", lambda tensor: True)
    # It knows no autocast, which is for the stem alone; that is of the right dtype as it is.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return "meta"


SCHEDULES = [sequential(), diagonal(1), diagonal(3)]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@samplings
@schedules
def test_no_step_waits_for_the_device(schedule: Schedule, sampling: Sampling) -> None:
    plain = stepped(stepper(schedule, sampling))
    assert same(vars(stepped(stepper(schedule, sampling), NoWaiting())), vars(plain))


@samplings
@schedules
def test_no_step_looks_at_a_value(schedule: Schedule, sampling: Sampling, unread: str) -> None:
    """Where there are none: the ops' own checks, too, leave the device alone."""
    drawn = stepped(stepper(schedule, sampling, unread), NoWaiting())
    assert drawn.codes.is_meta
    assert drawn.codes.shape == (6, 5, 12)


PLANTED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "int": lambda x: int(x.max()),
    "bool": lambda x: bool((x > 3).any()),
    "index": lambda x: range(99)[x[0, 0]],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 3),
    "mask": lambda x: x[x > 3],
    "masked_select": lambda x: x.masked_select(x > 3),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "repeats": lambda x: x.repeat_interleave(x[:, 0].clamp(0, 1), 0),
}


def planted(device: str, fault: Callable[[Stepper], object]) -> Stepper:
    """A loop that does something wrong after every step."""
    loop = stepper(diagonal(2), SAMPLINGS["plain"], device)
    draw = loop._draw

    def faulty(hidden: Tensor, at: Any) -> None:
        draw(hidden, at)
        fault(loop)

    loop._draw = faulty
    return loop


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_seen(fault: str) -> None:
    def wrong(loop: Stepper) -> object:
        return PLANTED[fault](loop.known)

    stepped(planted("cpu", wrong))
    with pytest.raises(WaitsError):
        stepped(planted("cpu", wrong), NoWaiting())


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_look_at_a_value_is_seen(fault: str, unread: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        stepped(planted(unread, lambda loop: PLANTED[fault](loop.known)))


@pytest.mark.parametrize("fault", ["cpu", "tolist", "upload"])
def test_a_planted_copy_is_seen(fault: str, unread: str) -> None:
    copies: dict[str, Callable[[Stepper], object]] = {
        "cpu": lambda loop: loop.known.cpu(),
        "tolist": lambda loop: loop.known.tolist(),
        "upload": lambda loop: torch.tensor([1]).to(unread),
    }
    with pytest.raises((WaitsError, NotImplementedError)):
        stepped(planted(unread, copies[fault]), NoWaiting())


class Recorder(TorchDispatchMode):
    """Records ops, to do the same to the same memory again: what a CUDA graph does.

    Indices, sizes and numbers are as they were when it was recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, old in self.calls:
            new = func(*args, **kwargs)
            pairs = zip(old, new, strict=True) if isinstance(new, tuple | list) else [(old, new)]
            for to, value in pairs:
                if to.data_ptr() != value.data_ptr():
                    to.copy_(value)


@samplings
@row_ends
@pytest.mark.parametrize("window", [1, 3, 4])
def test_steps_can_be_graphs(window: int, row_end: str, sampling: Sampling) -> None:
    captured = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        with Recorder() as recorder:
            step()
        captured.append(recorder)
        return recorder.replay

    schedule = diagonal(window, row_end)
    plain = stepped(stepper(schedule, sampling))
    loop = stepper(schedule, sampling, capture=capture)
    assert same(vars(stepped(loop)), vars(plain))
    sizes = {(len(step.slots), len(step.places)) for steps in loop._plan.values() for step in steps}
    assert len(captured) == len(sizes) < sum(map(len, loop._plan.values()))


@samplings
@pytest.mark.parametrize("context", [1, 3])
def test_what_was_in_the_cache_does_not_matter(
    context: int, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    for schedule in SCHEDULES:
        plain = stepped(stepper(schedule, sampling, context=context))
        with monkeypatch.context() as patch:
            patch.setattr(stepping, "_empty", poisoned)
            assert same(vars(stepped(stepper(schedule, sampling, context=context))), vars(plain))
