"""TRL's own GRPO trainer, with and without the fused ops: the same losses to rounding."""

from collections import defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlir import ops
from rlir.ops import policy_loss, policy_loss_reference

pytest.importorskip("trl", reason="TRL is not installed (the extra dev brings it)")

from tiny_trl import train
from trl import GRPOTrainer

from rlir.integrations.trl import LOSS_TYPES, FusedGRPOTrainer


class Accelerator:
    """One process."""

    num_processes, process_index, sync_gradients = 1, 0, True

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x


def stub(trainer: type, logprob: Tensor, **options: Any) -> Any:
    """What ``_compute_loss`` reads of a trainer, whose model gives ``logprob``."""
    args = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 2}
    args.update({k: options.pop(k) for k in list(options) if k in args})
    values = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.3,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 2,
        "max_completion_length": 50,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        **options,
    }
    found = trainer.__new__(trainer)
    found.__dict__.update(values)
    found.args = SimpleNamespace(**args)
    found.accelerator = Accelerator()
    found.model = SimpleNamespace(training=True)
    found._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    entropies = logprob.detach().abs()
    found._get_per_token_logps_and_entropies = lambda *_, **__: (logprob, entropies, None)
    return found


def batch(b: int = 6, t: int = 40, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the policy and the inputs of ``_compute_loss``, float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(b, t, generator=g, dtype=torch.float64)

    p = -3 * torch.rand(b, t, generator=g, dtype=torch.float64)
    old = p + normal(0.3) + normal(0.3)[:, :1]
    lengths = torch.randint(1, t + 1, (b, 1), generator=g)
    mask = (torch.arange(t) < lengths).long()
    mask[1] = 0  # a completion that is left out whole
    ids = torch.zeros(b, t, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2] + 1,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": normal(1.0)[:, 0],
        "old_per_token_logps": old,
        "ref_per_token_logps": p + normal(0.5),
        "num_items_in_batch": mask.sum() * 2,
        "importance_sampling_ratio": normal(0.3).exp().clamp(max=1.5),
    }
    return p, inputs


def loss_of(trainer: type, p: Tensor, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Loss, gradient and metrics of a trainer's ``_compute_loss``."""
    leaf = p.clone().requires_grad_()
    made = stub(trainer, leaf, **options)
    loss = made._compute_loss(None, inputs)
    loss.backward()
    return loss.detach(), leaf.grad, made._metrics["train"]


@pytest.mark.parametrize("op", [policy_loss, policy_loss_reference], ids=["cpu", "reference"])
@pytest.mark.parametrize(("loss_type", "level"), list(product(LOSS_TYPES, ("token", "sequence"))))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"delta": 1.6, "beta": 0.1},
        {"delta": 1.6, "beta": 0.1, "use_bias_correction_kl": True},
    ],
)
def test_the_op_is_trls_loss(op: Any, loss_type: str, level: str, options: dict) -> None:
    p, inputs = batch()
    high = 2.0 if loss_type == "cispo" else 0.3
    loss, gradient, _ = loss_of(
        GRPOTrainer,
        p,
        inputs,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=high,
        **options,
    )
    leaf = p.clone().requires_grad_()
    got, _ = op(
        leaf,
        inputs["old_per_token_logps"],
        inputs["advantages"],
        ref_logprob=inputs["ref_per_token_logps"],
        mask=inputs["completion_mask"].bool(),
        loss_type=loss_type,
        importance_level=level,
        clip_low=0.2,
        clip_high=high,
        delta=options.get("delta"),
        kl_weight=options.get("beta", 0.0),
        kl_importance=options.get("use_bias_correction_kl", False),
        normalizer=inputs["num_items_in_batch"],
        max_length=50,
    )
    got.backward()
    steps = 1 if loss_type in ("dapo", "cispo") else 2  # of gradient accumulation
    torch.testing.assert_close(got.detach(), loss * steps, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaf.grad, gradient * steps, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1, "delta": 1.6, "advantages": "token"},
        {"beta": 0.1, "use_vllm": True, "tools": True},
        {"beta": 0.1, "use_bias_correction_kl": True},
        {"old": None},
    ],
    ids=["plain", "delta", "vllm", "kl importance", "on-policy"],
)
def test_the_trainers_loss_and_metrics_are_trls(loss_type: str, level: str, options: dict) -> None:
    options = {"loss_type": loss_type, "importance_sampling_level": level, **options}
    p, inputs = batch()
    inputs["completion_mask"][1, 0] = 1
    if options.pop("advantages", None) and level == "token":
        inputs["advantages"] = inputs["advantages"][:, None] * torch.rand(p.shape).double()
    if options.pop("tools", False):
        inputs["tool_mask"] = (torch.rand(p.shape) < 0.7).long()
        inputs["tool_mask"][:, 0] = 1
    if "old" in options:
        inputs["old_per_token_logps"] = options.pop("old")
    expected, got = (loss_of(t, p, inputs, **options) for t in (GRPOTrainer, FusedGRPOTrainer))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=1e-14)
    left = {"clip_ratio/low_min", "clip_ratio/high_max"}  # need a figure for each sequence
    names = set(got[2])
    assert names >= set(expected[2]) - left
    for name in names:
        assert got[2][name] == pytest.approx(expected[2][name], rel=1e-6, abs=1e-7), name


CASES = {
    "grpo": {},
    "dapo, off-policy": {"loss_type": "dapo", "steps_per_generation": 2, "num_iterations": 3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0},
    "dr_grpo, batch": {"loss_type": "dr_grpo", "scale_rewards": "batch", "delta": 4.0},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "gradient_accumulation_steps": 2},
    "bnpo, none": {"loss_type": "bnpo", "scale_rewards": "none"},
}


def curve(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("case", CASES)
def test_trls_trainer_has_the_same_losses(case: str, tmp_path: Path) -> None:
    plain, fused = (
        train(kind, tmp_path / kind.__name__, **CASES[case])
        for kind in (GRPOTrainer, FusedGRPOTrainer)
    )
    assert fused.unfused() is None
    assert len(curve(plain, "loss")) == 4
    for name in ("loss", "reward", "entropy", "grad_norm"):
        assert curve(fused, name) == pytest.approx(curve(plain, name), rel=2e-3, abs=2e-5), name
    assert any(abs(x) > 1e-4 for x in curve(plain, "loss") + curve(plain, "grad_norm"))
    for a, b in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_the_fused_trainer_calls_the_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``selected_logprob`` for policy and reference."""
    calls: list[str] = []

    def counted(name: str, op: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return op(*args, **options)

        return call

    expected = train(GRPOTrainer, tmp_path / "plain", max_steps=2)
    for name in ("policy_loss", "group_advantage", "selected_logprob"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    got = train(FusedGRPOTrainer, tmp_path / "fused", max_steps=2)
    assert calls.count("policy_loss") == 2
    assert calls.count("group_advantage") == 1
    assert calls.count("selected_logprob") >= 3
    assert curve(got, "loss") == pytest.approx(curve(expected, "loss"), rel=2e-3, abs=2e-5)
    assert curve(got, "entropy") == pytest.approx(curve(expected, "entropy"), rel=1e-4)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation made, forward and backward, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


def test_the_fused_trainer_needs_less_memory(tmp_path: Path) -> None:
    """Nothing of [tokens, vocabulary] in a training step, where TRL holds its logits."""
    largest = {}
    for kind in (GRPOTrainer, FusedGRPOTrainer):
        seen: list[int] = []

        class Watched(kind):  # type: ignore[misc, valid-type]
            def compute_loss(self, *args: Any, **options: Any) -> Any:
                with Sizes() as sizes:
                    loss = super().compute_loss(*args, **options)
                    loss.backward(retain_graph=True)
                self.model.zero_grad()
                seen.append(sizes.largest)  # noqa: B023
                return loss

        train(Watched, tmp_path / kind.__name__, words=20_000, max_steps=1)
        largest[kind] = max(seen)
    assert largest[FusedGRPOTrainer] < largest[GRPOTrainer] / 2
