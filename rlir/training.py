"""The loop of supervised training: seeded batches, cosine schedule, exact resume, clean Ctrl-C.

The batch of step i is drawn from a generator seeded by (seed, i), so the data order needs no
state: a resumed run sees what an uninterrupted one would have seen, and ends in the same bits.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rlir import console
from rlir.checkpoints import copy_state, load_state, read_json, save_state, write_json
from rlir.errors import InputError, TrainingError
from rlir.tracing import span

STATE = "state.pt"


def check_seed(seed: int) -> None:
    """A seed that NumPy and torch both take."""
    if not 0 <= seed < 2**31:
        raise InputError(f"seed: must be from 0 and below 2**31, got {seed}")


@dataclass(frozen=True)
class FitConfig:
    """How a model is trained."""

    steps: int = 5000
    """Optimizer steps."""
    batch: int = 32
    """Samples a step."""
    learning_rate: float = 1e-3
    """Peak of the cosine schedule (AdamW)."""
    warmup: int = 100
    """Steps of linear warm-up."""
    final_fraction: float = 0.02
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.02
    """AdamW weight decay, on matrices only."""
    beta2: float = 0.95
    """AdamW's second moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the matrices of a transformer's layers and AdamW for the rest."""
    seed: int = 0
    """Seeds the weights and the order of the data."""
    evaluate_every: int = 500
    """Steps between evaluations on held-out data."""
    checkpoint_every: int = 250
    """Steps between saved states; --resume goes on from the last one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"training: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"training: learning_rate must be above 0, got {self.learning_rate}")
        check_seed(self.seed)


class Task(Protocol):
    """What ``fit`` trains."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]: ...

    def evaluate(self) -> dict[str, float]: ...


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_fraction`` of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, config.steps)))
    return (
        config.learning_rate * warm * (config.final_fraction + (1 - config.final_fraction) * cosine)
    )


class Optimizers:
    """Several optimizers that step as one, each over parameters of its own."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def make_muon(
    model: nn.Module, learning_rate: float, weight_decay: float, beta2: float
) -> Optimizers:
    """Muon for the matrices within ``model.layers``, AdamW for everything else.

    Muon orthogonalises each matrix's momentum (https://kellerjordan.github.io/posts/muon); its
    step is scaled to AdamW's, so both take one learning rate. Embeddings, convolutions and the
    output layer are not matrices between hidden states and stay with AdamW.
    """
    inner = dict(model.named_parameters())
    hidden = [p for n, p in inner.items() if n.startswith("layers.") and p.dim() == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in inner.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return Optimizers(
        torch.optim.Muon(
            hidden, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw", nesterov=True
        ),
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2)),
    )


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step: its draws depend on (seed, step) alone.

    Torch's CPU generator keeps the low 32 bits of a seed; a multiple of the golden ratio's keeps
    the steps of different seeds apart in them.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)


class InterruptedRun(Exception):  # noqa: N818 (a wish of the user, not an error)
    """Ctrl-C or SIGTERM came; the state was saved."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came. A second Ctrl-C ends at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.say("interrupted: finishing this step and saving (again to stop at once)")

    try:
        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_output(out: Path, identity: dict[str, Any], resume: bool) -> bool:
    """Claim an output folder for a run. Returns whether there is a run to go on with.

    The folder of another run is never written to; the same run needs ``--resume``.
    """
    path = out / "run.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"output: {out} must be a folder, it is a file")
    if path.exists():
        if not resume:
            raise InputError(
                f"output: {out} must be empty or come with --resume, it holds another run"
            )
        found = read_json(path)
        if found != identity:
            changed = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
            raise InputError(
                f"resume: {out} must be of the same settings, got other {', '.join(changed)}"
            )
        return True
    # A run that was killed while it claimed the folder leaves the partial file alone.
    if out.exists() and any(file.name != f".{path.name}.partial" for file in out.iterdir()):
        raise InputError(f"output: {out} must be empty or not exist, it holds other files")
    if resume:
        console.say(f"resume: {out} holds no run yet; starting it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)
    return False


def fit(
    task: Task, config: FitConfig, out: Path, *, resumed: bool, stop_after: int | None = None
) -> list[dict[str, float]]:
    """Train ``task.model`` for ``config.steps`` steps. Returns the evaluations, oldest first.

    Raises InterruptedRun after Ctrl-C and TrainingError for a loss or a gradient that is not
    finite; the state is on disk in both cases (of a failed step: as it was before it).
    ``stop_after`` ends the call after that many steps (stages, tests).
    """
    model, state_path = task.model, out / STATE
    make = make_muon if config.optimizer == "muon" else make_optimizer
    optimizer = make(model, config.learning_rate, config.weight_decay, config.beta2)
    step, seconds, history = 0, 0.0, []
    smooth: float | None = None
    if resumed and state_path.exists():
        state = load_state(state_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, history = state["step"], state["seconds"], state["history"]
        smooth = state.get("smooth")

    def save() -> None:
        save_state(
            state_path,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "history": history,
                "smooth": smooth,
                "config": asdict(config),
            },
        )

    last = config.steps if stop_after is None else min(config.steps, step + stop_after)
    with interruptible() as asked, console.progress("training", config.steps, step) as bar:
        while step < last:
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            model.train()
            buffers = copy_state(dict(model.named_buffers()))
            with span("pretrain.step", step):
                loss, _ = task.loss(step_generator(config.seed, step))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
            value = float(loss.detach())
            if not math.isfinite(value + norm):
                for name, buffer in model.named_buffers():  # running means saw the bad batch
                    buffer.copy_(buffers[name])
                save()
                raise TrainingError(
                    f"step {step}: loss and gradient must be finite, got {value} and {norm}; "
                    f"state saved"
                )
            optimizer.step()
            step += 1
            seconds += time.perf_counter() - begin
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            bar(step, f"loss {smooth:.4f}")
            if step % config.evaluate_every == 0 or step == config.steps:
                model.eval()
                figures = task.evaluate()
                history.append({"step": step, "seconds": round(seconds), "loss": smooth, **figures})
                console.say(console.figures(history[-1]))
            if asked() or step % config.checkpoint_every == 0 or step == last:
                save()
            if asked() and step < last:
                raise InterruptedRun
    model.eval()
    return history
