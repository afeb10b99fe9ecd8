"""Group rollouts out of one key-value cache: a native call a frame, sampling included.

What a rollout draws depends on its prompt, its actions, the seed and its row id alone: not on the
batch, the order, the memory limit, the number of threads or the instruction set.
``rlir.rollout.stepwise`` is the same out of public ops. docs/rollout.md has the design.

Legend: P prompts, G group size, B = P G rollouts, L frames with the context, S visual tokens, A
action tokens, S' slots of an image, D hidden size.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.models.stem import packed_stem
from rlir.models.world_model import WorldModel, rotary_table
from rlir.rollout.groups import KEYS, Group, OnGroup, Pool, Request, groups_of
from rlir.rollout.memory import MemoryPlan, capacities, limit_of, plan_memory
from rlir.rollout.packing import WeightFormat, pack_decoder
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Schedule, sequential
from rlir.rollout.stream import blank_trajectories, fed_tokens, given_tokens
from rlir.rollout.trajectories import NOTHING, Prompt, Trajectories
from rlir.tracing import clocked, span

_LARGE = 48 * 2**20
"""Bytes of weights beyond which all threads share every product: what the caches of a few cores
hold is read once a thread, what they do not is read once."""


def rollout_seed(seed: int, number: int) -> int:
    """The key of one batch of rollouts: of a run's seed, below 2^31, and a number below 2^32."""
    return seed << 32 | number


@dataclass
class _Caches:
    """Keys and values: csrc/cpu/decoder.h."""

    prompt_k: Tensor
    prompt_v: Tensor
    tail_k: Tensor
    tail_v: Tensor
    k: Tensor
    v: Tensor


class RolloutEngine:
    """Rolls out one policy: the weights of a world model as they were when the engine was made.

    Weights are rounded to ``dtype`` and packed once. In bfloat16 the operands of products (weights,
    activations, keys and values) are bfloat16; sums, the residual stream, norms, softmax and logits
    are float32. Weights are packed for the instruction set in use, and only serve that.

    Args:
        model: on the CPU; its weights are copied.
        dtype: bfloat16 or float32.
        max_bytes: of weights, caches, work space and results of a rollout; by default 0.8 of the
            memory that is available when one starts.
        weights: "int8" keeps the weights of the layers as int8, with a scale per output channel:
            half the bytes, and another policy. Its trajectories say so (``same_policy``).
    """

    def __init__(
        self,
        model: WorldModel,
        dtype: torch.dtype = torch.bfloat16,
        *,
        max_bytes: int | None = None,
        weights: WeightFormat = "dtype",
    ):
        if dtype not in (torch.bfloat16, torch.float32):
            raise InputError(f"rollout: dtype must be bfloat16 or float32, got {dtype}")
        if max_bytes is not None and max_bytes < 1:
            raise InputError(f"rollout: max_bytes must be at least 1 or None, got {max_bytes}")
        self.weights = weights
        if weights == "int8" and (dtype != torch.bfloat16 or _library.PATH is None):
            raise InputError("rollout: int8 weights must go with bfloat16 and the native library")
        self.config, self.dtype, self.max_bytes = model.config, dtype, max_bytes
        self.action_tokens = model.action_tokens
        self.native = _library.PATH is not None
        self._action_ids = model.action_ids
        if not self.native:
            from rlir.rollout.stepwise import StepwiseEngine

            self._slow = StepwiseEngine(model, dtype)
            return
        with torch.inference_mode():
            self._weights = pack_decoder(model, dtype, weights)
            stem = getattr(model, "stem", None)
            self._stem = None if stem is None else packed_stem(stem, dtype)

    # -- what it takes -------------------------------------------------------------------------

    def memory(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int = 1,
        frames: int | None = None,
        schedule: Schedule | None = None,
        sampling: Sampling | None = None,
    ) -> MemoryPlan:
        """What ``rollout`` of the same arguments would take."""
        request = self._request(
            prompts, group_size, frames, schedule or sequential(), sampling or Sampling(), 0, None
        )
        return self._plan(request, self._given(request))

    def _given(self, request: Request) -> tuple[list[Tensor], list[int], float]:
        """Weights, sizes and epsilon for the ops; the rotary table reaches the longest rollout."""
        c = self.config
        positions = c.tokens + (request.length - 1) * c.block
        table = rotary_table(c, 0, max(positions, c.positions))
        weights = [*self._weights[:4], table.float().contiguous(), *self._weights[4:]]
        sizes = [c.hidden, c.layers, c.heads, c.kv_heads, c.mlp, c.codes]
        sizes += [self._weights[0].shape[0], c.tokens, c.block, table.shape[1]]
        return weights, [*sizes, int(self.dtype == torch.bfloat16)], c.norm_eps

    def _plan(self, request: Request, given: tuple[list[Tensor], list[int], float]) -> MemoryPlan:
        held = sum(x.nbytes for x in (*given[0], *(self._stem[0] if self._stem else [])))

        def sizes_of(rows: int, slots: int) -> list[int]:
            found: list[int] = torch.ops.rlir._decoder_sizes.default(*given, rows, slots)
            return found

        return plan_memory(
            self.config, request, sizes_of, weights=held, item=self.dtype.itemsize,
            has_stem=self._stem is not None, shares_products=self._shares_products,
            limit=limit_of(self.max_bytes, held),
        )  # fmt: skip

    def _shares_products(self, rollouts: int) -> bool:
        """Whether all threads share every product, or each takes rollouts of its own."""
        weights = sum(x.nbytes for x in self._weights[4:])
        return weights > _LARGE or rollouts <= 8 * (torch.get_num_threads() - 1)

    # -- rolling out ---------------------------------------------------------------------------

    def rollout(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int = 1,
        frames: int | None = None,
        schedule: Schedule | None = None,
        sampling: Sampling | None = None,
        seed: int,
        row_ids: Tensor | None = None,
        on_group: OnGroup | None = None,
    ) -> Trajectories:
        """Continue each prompt ``group_size`` times.

        Groups roll at the same time as far as memory goes, the longest first; when one is done the
        next prompt takes its place. A rollout longer than the model's ``config.frames`` drops whole
        frames from the front: their keys and values are no longer seen, those of the others stay as
        they are, and positions go on. Training scores it under the same mask.

        Args:
            prompts: of any number of context frames and actions.
            frames: to draw at most; by default one for each action.
            schedule: ``sequential()`` by default, or ``diagonal(window, row_end)``.
            sampling: ``Sampling()`` by default: temperature 1, nothing left out.
            seed: from 0 and below 2^63.
            row_ids: int64 [B], who a rollout is, whatever batch it is in; 0, 1, ... if None.
            on_group: called with a prompt's index and its group's trajectories as soon as these are
                done, one group after the other on a thread of its own, while others roll on. What
                it raises is raised here, after the groups that are under way.

        Returns:
            Rows grouped: prompt p's members are rows p G .. (p + 1) G. The code at raster stream
            position n of a rollout is ``sample_tokens`` of its logits with (seed, offset n, row
            id).
        """
        schedule, sampling = schedule or sequential(), sampling or Sampling()
        if not self.native:
            out = self._slow.rollout(
                prompts, group_size=group_size, frames=frames, schedule=schedule,
                sampling=sampling, seed=seed, row_ids=row_ids,
            )  # fmt: skip
            if on_group is not None:
                for i in range(len(prompts)):
                    on_group(i, out.rows(torch.arange(i * group_size, (i + 1) * group_size)))
            return out
        request = self._request(
            prompts, group_size, frames, schedule, sampling, seed, row_ids, on_group
        )
        try:
            with span("rollout", len(prompts) * group_size), torch.inference_mode():
                out = self._roll(request, schedule)
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            ours = line.startswith(("rollout: ", "decoder: "))
            raise (InputError(line) if ours else error) from None
        return out.outside_inference_mode()

    def _request(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        frames: int | None,
        schedule: Schedule,
        sampling: Sampling,
        seed: int,
        row_ids: Tensor | None,
        on_group: OnGroup | None = None,
    ) -> Request:
        groups = groups_of(self.config, self._action_ids, prompts, group_size, frames)
        if not 0 <= seed < 2**63:
            raise InputError(f"rollout: seed must be from 0 and below 2^63, got {seed}")
        count = len(prompts) * group_size
        if row_ids is not None and (row_ids.dtype != torch.int64 or row_ids.shape != (count,)):
            raise InputError(
                f"rollout: row_ids must be int64 [{count}], "
                f"got {row_ids.dtype} of shape {tuple(row_ids.shape)}"
            )
        plan = schedule.plan(self.config.rows, self.config.columns)
        longest = max((group.frames for group in groups), default=1)
        window = self.config.frames if longest > self.config.frames else None
        ids = torch.arange(count) if row_ids is None else row_ids.contiguous()
        return Request(groups, group_size, plan, sampling, seed, ids, window, on_group)

    def _allocate(self, request: Request, memory: MemoryPlan, words: tuple[int, int]) -> _Caches:
        c, dim = self.config, self.config.hidden // self.config.heads
        prompt, own = capacities(self.config, request)
        blocks, groups = own // KEYS, memory.groups
        word = self._weights[8].dtype  # int32: two bfloat16

        def cache(sequences: int, count: int, words: int) -> Tensor:
            out = torch.empty(c.layers, sequences, c.kv_heads, count * words, dtype=word)
            torch.ops.rlir._huge_pages.default(out)
            return out

        rows = (c.layers, groups, c.kv_heads, prompt, dim)
        return _Caches(
            torch.empty(*rows, dtype=self.dtype),
            torch.empty(*rows, dtype=self.dtype),
            cache(groups, 1, words[0]),
            cache(groups, 1, words[1]),
            cache(groups * request.group_size, blocks, words[0]),
            cache(groups * request.group_size, blocks, words[1]),
        )

    def _roll(self, request: Request, schedule: Schedule) -> Trajectories:
        begin = time.perf_counter()
        given = self._given(request)
        memory = self._plan(request, given)
        _, _, keys, values, _, _ = torch.ops.rlir._decoder_sizes.default(*given, 1, KEYS)
        caches = self._allocate(request, memory, (keys, values))
        out = blank_trajectories(
            self.config, request.groups, request.group_size, request.plan,
            schedule=schedule, sampling=request.sampling, seed=request.seed,
            row_ids=request.row_ids, same_policy=self.weights == "dtype",
        )  # fmt: skip
        pool = Pool(request.groups, memory.groups, request.group_size)
        seconds = {"prefill": 0.0, "stem": 0.0, "decode": 0.0}
        waiting: list[Future[object]] = []
        with ThreadPoolExecutor(1) as later:
            while pool.busy:
                for group in pool.admit():
                    with (
                        clocked(seconds, "prefill"),
                        span("rollout.prefill", group.context * self.config.tokens),
                    ):
                        self._prefill(request, given, caches, group)
                if pool.active:
                    self._frame(request, given, caches, pool.active, out, seconds)
                for group in pool.advance():
                    self._finish(request, group, out)
                    if request.on_group is not None:
                        part = out.rows(self._rows(request, [group])).outside_inference_mode()
                        waiting.append(later.submit(request.on_group, group.index, part))
                for done in [x for x in waiting if x.done()]:
                    waiting.remove(done)
                    done.result()
            seconds["rolling"] = time.perf_counter() - begin
            for future in waiting:
                future.result()
        steps = sum(x.frames - x.context for x in request.groups) * request.plan.steps
        seconds |= {"total": time.perf_counter() - begin}
        counts = {
            "steps": float(steps * request.group_size),
            "groups_at_once": float(memory.groups),
        }
        return replace(out, timings={**seconds, **counts, "bytes": float(memory.total)})

    def _rows(self, request: Request, groups: Sequence[Group]) -> Tensor:
        """Rows of groups in the results."""
        g = request.group_size
        first = torch.tensor([x.index * g for x in groups])
        return (first[:, None] + torch.arange(g)).flatten()

    def _prefill(
        self,
        request: Request,
        given: tuple[list[Tensor], list[int], float],
        caches: _Caches,
        group: Group,
    ) -> None:
        tokens = given_tokens(request.plan, self.action_tokens, self.config.codes, group)
        added = None
        if self._stem is not None and group.context > 1:
            said = self._stem_of(group.codes[:-1], group.actions[: group.context - 1])
            added = tokens.scatter(said)[None]
        mask = request.plan.mask(self.action_tokens, group.context, request.window)
        torch.ops.rlir._decoder_prefill.default(
            *given, tokens.ids[None], tokens.embeds, tokens.positions, tokens.slots, added,
            mask.kind, list(mask.numbers), group.slot, True,
            caches.prompt_k, caches.prompt_v, caches.tail_k, caches.tail_v,
        )  # fmt: skip

    def _stem_of(self, previous: Tensor, blocks: Tensor) -> Tensor:
        """float32 [N, S, D]."""
        assert self._stem is not None
        out = torch.empty(len(previous), self.config.tokens, self.config.hidden)
        torch.ops.rlir._decoder_stem.default(
            *self._stem, previous.contiguous(), blocks.contiguous(), out
        )
        return out

    def _stem_of_groups(
        self, active: Sequence[Group], g: int, previous: Tensor, blocks: Tensor
    ) -> Tensor:
        """``_stem_of``, once for a group whose frame before was given: all see the same."""
        fresh = [x.frame == x.context for x in active]
        if not any(fresh) or g == 1:
            return self._stem_of(previous, blocks)
        rows = [range(i * g, i * g + (1 if new else g)) for i, new in enumerate(fresh)]
        some = torch.tensor([row for part in rows for row in part])
        said = self._stem_of(previous[some], blocks[some])
        counts = [g if new else 1 for part, new in zip(rows, fresh, strict=True) for _ in part]
        return said.repeat_interleave(torch.tensor(counts), 0)

    def _frame(
        self,
        request: Request,
        given: tuple[list[Tensor], list[int], float],
        caches: _Caches,
        active: Sequence[Group],
        out: Trajectories,
        seconds: dict[str, float],
    ) -> None:
        """The next frame of each active group."""
        c, g, plan, sampling = self.config, request.group_size, request.plan, request.sampling
        rows, n = self._rows(request, active), len(active) * g
        frame = torch.tensor([x.frame for x in active]).repeat_interleave(g)
        previous = out.codes[rows, frame - 1]
        blocks = out.actions[rows, frame - 1]
        image = self.action_tokens + plan.slots
        table = torch.empty(n, 6, dtype=torch.int64)
        slot = torch.tensor([x.slot for x in active])
        table[:, 0] = slot.repeat_interleave(g)
        table[:, 1] = (slot[:, None] * g + torch.arange(g)).flatten()
        context = torch.tensor([x.context for x in active]).repeat_interleave(g)
        table[:, 2] = plan.slots + (context - 1) * image
        table[:, 3] = plan.slots + (frame - 1) * image
        table[:, 4] = c.tokens + (frame - 1) * c.block
        table[:, 5] = torch.where(frame > context, previous[:, -1], NOTHING)
        stem = None
        if self._stem is not None:
            with clocked(seconds, "stem"), span("rollout.stem", n):
                stem = self._stem_of_groups(active, g, previous, blocks)
        ends = torch.arange(1, c.rows + 1) * c.columns - 1
        codes = torch.empty(n, c.tokens, dtype=torch.int64)
        logprob, entropy = torch.empty(2, n, c.tokens)
        support = None
        if out.support is not None:
            support = torch.empty(n, c.tokens, out.support.shape[-1], dtype=torch.uint8)
        feeds = [(x.step, x.slot, x.place, int(x.stands_in), x.predicts) for x in plan.feeds]
        with clocked(seconds, "decode"), span("rollout.frame", n * c.tokens):
            torch.ops.rlir._decoder_frame.default(
                *given, caches.prompt_k, caches.prompt_v, caches.tail_k, caches.tail_v,
                caches.k, caches.v, table, torch.tensor(feeds, dtype=torch.int64), c.rows,
                plan.slots, list(plan.mask(self.action_tokens, 0, request.window).numbers),
                blocks, out.codes[rows, 0][:, ends].contiguous(), stem,
                request.row_ids[rows], codes, logprob, entropy, support, request.seed,
                sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p,
                self._shares_products(n),
            )  # fmt: skip
        out.codes[rows, frame] = codes
        out.logprob[rows, frame - 1] = logprob
        out.entropy[rows, frame - 1] = entropy
        if out.support is not None and support is not None:
            out.support[rows, frame - 1] = support

    def _finish(self, request: Request, group: Group, out: Trajectories) -> None:
        if group.frames == group.context:
            return
        rows = self._rows(request, [group])
        fed = fed_tokens(
            request.plan, self.config.codes, out.codes[rows, : group.frames],
            out.actions[rows, : group.frames - 1], group.context,
        )  # fmt: skip
        out.fed[rows, : fed.shape[1]] = fed
