"""Group rollouts under any schedule, on any device, step by step in public ops.

On the CPU its bits are those of teacher-forced scoring (``rlir.rollout.parity``) and of the native
engine, whose reference it is. ``rlir.rollout.stepping`` has the loop over steps.

Legend: P prompts, G group size, B = P G rollouts, L frames of the longest one with its context,
S visual tokens, A action tokens, S' slots of an image.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlir.errors import InputError
from rlir.models.world_model import WorldModel
from rlir.rollout.groups import Group, groups_of
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Plan, Schedule, sequential
from rlir.rollout.stepping import Drawn, Stepper, cuda_graph
from rlir.rollout.trajectories import NOTHING, Prompt, Trajectories
from rlir.tracing import span

_SAMPLING = Sampling()
_SEQUENTIAL = sequential()


def inference_copy(model: WorldModel, dtype: torch.dtype = torch.bfloat16) -> WorldModel:
    """The policy that rolls out: the model's weights rounded to ``dtype``, without gradients."""
    out = copy.deepcopy(model).to(dtype).eval()
    out.rotary = model.rotary  # angles of far positions need their digits
    return out.requires_grad_(False)


class StepwiseEngine:
    """Rolls out one policy: the weights of a world model as they were when the engine was made.

    Weights are rounded to ``dtype``, as are the operands of products (activations, keys, values);
    sums, the residual stream, norms, softmax and logits are float32. On the CPU a rollout depends
    on its prompt, its actions, the seed and its row id alone, bit for bit. On CUDA a step is a
    graph (``rlir.rollout.stepping``). That has not been run: tests step on a device without values,
    where nothing can be looked at, and repeat recorded steps on the CPU.
    """

    def __init__(
        self,
        model: WorldModel,
        dtype: torch.dtype = torch.bfloat16,
        *,
        device: torch.device | str | None = None,
    ):
        if dtype not in (torch.bfloat16, torch.float32):
            raise InputError(f"rollout: dtype must be bfloat16 or float32, got {dtype}")
        self.policy = inference_copy(model, dtype)
        if device is not None:
            self.policy = self.policy.to(device)
        self.device = self.policy.rotary.device

    def rollout(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int = 1,
        frames: int | None = None,
        schedule: Schedule = _SEQUENTIAL,
        sampling: Sampling = _SAMPLING,
        seed: int,
        row_ids: Tensor | None = None,
    ) -> Trajectories:
        """Continue each prompt ``group_size`` times.

        Args:
            prompts: of any number of frames and actions. Those that agree in both go together.
            frames: how many to draw at most; as many as a prompt has actions for if None. Of a
                clip longer than the model's ``config.frames`` that many are seen.
            schedule: in what order the tokens of an image are drawn.
            sampling: how a token is drawn.
            seed: from 0 and below 2^63.
            row_ids: int64 [B], who a rollout is, whatever batch it is in; 0, 1, ... if None.

        Returns:
            Rows grouped: prompt p's members are rows p G .. (p + 1) G. The token at raster position
            n of a rollout is ``sample_tokens`` of its logits with (seed, offset n, row id).
            Temperature 0 takes the largest logit; its log-probability is that of the untempered
            model.
        """
        begin = time.perf_counter()
        config = self.policy.config
        groups = groups_of(config, self.policy.action_ids, prompts, group_size, frames)
        rows = torch.arange(len(groups) * group_size)
        who = rows if row_ids is None else row_ids
        _check(seed, who, len(rows))
        plan = schedule.plan(config.rows, config.columns)
        batches: dict[tuple[int, int], list[Group]] = {}
        for group in groups:
            batches.setdefault((group.context, group.frames), []).append(group)
        out = self._nothing(len(rows), max([1, *(x.frames for x in groups)]), plan, sampling)
        with span("rollout", len(rows)):
            for together in batches.values():
                members = rows.view(-1, group_size)[[x.index for x in together]].flatten()
                self._fill(out, together, members, who[members], plan, group_size, sampling, seed)
        steps = [(to - start) * plan.steps for start, to in batches]
        seconds = time.perf_counter() - begin

        def each(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).repeat_interleave(group_size)

        return Trajectories(
            **out,
            context=each([x.context for x in groups]),
            frames=each([x.frames for x in groups]),
            group=each([x.index for x in groups]),
            row_ids=who.clone(),
            seed=seed,
            schedule=schedule,
            sampling=sampling,
            timings={"rollout": seconds, "steps": float(sum(steps))},
        )

    def _nothing(self, count: int, length: int, plan: Plan, sampling: Sampling) -> dict[str, Any]:
        """Trajectories' tensors by name, without anything in them."""
        config, a = self.policy.config, self.policy.action_tokens
        shape, sizes = (count, length - 1, config.tokens), -(-config.codes // 8)
        fed = plan.slots + (length - 1) * (a + plan.slots)
        support = torch.zeros(*shape, sizes, dtype=torch.uint8) if sampling.truncates else None
        return {
            "codes": torch.full((count, length, config.tokens), NOTHING),
            "actions": torch.full((count, length - 1, a), NOTHING),
            "logprob": torch.zeros(shape),
            "entropy": torch.zeros(shape),
            "step": torch.full(shape, NOTHING, dtype=torch.int32),
            "fed": torch.full((count, fed), NOTHING),
            "support": support,
        }

    def _fill(
        self,
        out: dict[str, Any],
        groups: list[Group],
        rows: Tensor,
        row_ids: Tensor,
        plan: Plan,
        group_size: int,
        sampling: Sampling,
        seed: int,
    ) -> None:
        """Roll out groups of one context and length, into ``rows`` of ``out``."""
        device = self.device
        codes = torch.stack([x.codes for x in groups])
        actions = torch.stack([x.actions for x in groups])
        stepper = Stepper(
            *(self.policy, plan, sampling, codes.to(device), actions.to(device), group_size),
            seed=torch.tensor([seed]).to(device),
            row_ids=row_ids.to(device),
            capture=cuda_graph if device.type == "cuda" else None,
        )
        stepper.run()
        drawn: Drawn = stepper.drawn().cpu()
        context, length = codes.shape[1], actions.shape[1] + 1
        step = torch.tensor(plan.step_of(), dtype=torch.int32)
        first = torch.arange(length - context, dtype=torch.int32) * plan.steps
        found = {
            **vars(drawn),
            "actions": actions.repeat_interleave(group_size, 0),
            "step": (first[:, None] + step).expand(len(rows), -1, -1),
        }
        for name, x in found.items():
            if x is not None:
                start = context - 1 if name == "step" else 0
                out[name][rows, start : start + x.shape[1]] = x


def _check(seed: int, row_ids: Tensor, count: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"rollout: seed must be from 0 and below 2^63, got {seed}")
    if row_ids.dtype != torch.int64 or row_ids.shape != (count,) or row_ids.device.type != "cpu":
        raise InputError(
            f"rollout: row_ids must be int64 [{count}] on the CPU, "
            f"got {row_ids.dtype} of shape {tuple(row_ids.shape)} on {row_ids.device}"
        )
