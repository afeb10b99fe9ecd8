"""The native engine's turns: groups come and go as memory has places, and no bit depends on it."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from backends import instruction_set, instruction_sets, threads
from cases import make, mixed_prompts, poisoned_caches, prompt, row_ends
from testkit import same
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.models.world_model import WorldModel
from rlir.rollout import engine as engine_module
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.memory import readable
from rlir.rollout.parity import compare, trajectory_logprob
from rlir.rollout.sampling import Sampling, greedy
from rlir.rollout.schedule import Schedule, diagonal, sequential
from rlir.rollout.trajectories import Trajectories

pytestmark = pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
DTYPES = (torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def alike(a: Trajectories, b: Trajectories) -> bool:
    return all(
        same(x, getattr(b, name)) for name, x in a._tensors().items() if isinstance(x, Tensor)
    )


def room_for(engine: RolloutEngine, groups: int, **call: object) -> int:
    """The least max_bytes that ``groups`` groups fit."""
    low, high = 1, 2**34
    while low < high:
        middle = (low + high) // 2
        engine.max_bytes = middle
        try:
            fits = engine.memory(**call).groups >= groups
        except InputError:
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


@dtypes
@pytest.mark.parametrize("places", [1, 2, 3])
def test_memory_for_fewer_groups_changes_the_time_alone(places: int, dtype: torch.dtype) -> None:
    model = make("odd")
    call = {
        "prompts": mixed_prompts(model),
        "group_size": 3,
        "schedule": diagonal(2),
        "sampling": Sampling(0.8, top_p=0.9),
    }
    engine = RolloutEngine(model, dtype)
    whole = engine.rollout(**call, seed=1)
    assert whole.timings["groups_at_once"] == len(call["prompts"])
    engine.max_bytes = room_for(engine, places, **call)
    some = engine.rollout(**call, seed=1)
    assert some.timings["groups_at_once"] == places
    assert some.timings["bytes"] <= engine.max_bytes
    assert alike(whole, some)


def test_too_little_memory_is_one_line_with_the_numbers_before_anything_is_drawn() -> None:
    model = make()
    engine = RolloutEngine(model)
    call = {"prompts": [prompt(model, 1, 3)], "group_size": 4}
    plan = engine.memory(**call)
    assert plan.total == sum(
        [plan.weights, plan.prompt, 4 * plan.rollout, plan.workspace, plan.results]
    )
    engine.max_bytes = room_for(engine, 1, **call) - 1
    assert engine.max_bytes + 1 == plan.total
    with pytest.raises(InputError) as caught:
        engine.rollout(**call, seed=0, on_group=lambda *_: pytest.fail("drawn"))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("rollout: one group must fit max_bytes, ")
    for number in (plan.total, plan.weights, plan.prompt, plan.rollout, plan.workspace):
        assert readable(number) in line
    with pytest.raises(InputError, match="max_bytes must be at least 1 or None, got 0"):
        RolloutEngine(model, max_bytes=0)


def test_what_is_said_is_what_it_takes() -> None:
    """The process grows by what was announced, to a third and what the allocator keeps."""
    program = (
        "import sys\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from cases import make, prompt\n"
        "from rlir.rollout.engine import RolloutEngine\n"
        "sizes = {'rows': 8, 'columns': 8, 'codes': 512, 'hidden': 256, 'layers': 6, 'mlp': 512}\n"
        "model = make('tiny', **sizes, heads=4, kv_heads=4, stem_channels=0, frames=6)\n"
        "engine = RolloutEngine(model)\n"
        "engine.rollout([prompt(model, 1, 1)], seed=0)\n"
        "call = {'prompts': [prompt(model, 3, 3, i) for i in range(6)], 'group_size': 12}\n"
        "def status(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the high-water mark begins anew\n"
        "before, plan = status('VmRSS'), engine.memory(**call)\n"
        "engine.rollout(**call, seed=1)\n"
        "print(plan.total - plan.weights, status('VmHWM') - before)\n"
    )
    folders = [str(Path(__file__).parents[i]) for i in (0, 1)]
    done = subprocess.run(
        [sys.executable, "-c", program, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, took = (int(x) for x in done.stdout.split())
    assert took < 1.33 * said + 2**24, (readable(said), readable(took))
    assert took > 0.3 * said, (readable(said), readable(took))


@pytest.mark.parametrize("schedule", [sequential(), diagonal(2)], ids=str)
def test_a_group_is_handed_on_when_it_is_done(schedule: Schedule) -> None:
    model = make()
    prompts = [prompt(model, 1, n, seed=n) for n in (5, 1, 3)]
    engine, seen, here = RolloutEngine(model), [], threading.get_ident()

    def take(index: int, group: Trajectories) -> None:
        assert threading.get_ident() != here
        seen.append((index, group))

    whole = engine.rollout(prompts, group_size=2, schedule=schedule, seed=4, on_group=take)
    assert [index for index, _ in seen] == [1, 2, 0], "the shortest is done first"
    for index, group in seen:
        assert alike(whole.rows(torch.tensor([2 * index, 2 * index + 1])), group)
        assert not group.logprob.is_inference()


def test_what_is_done_with_a_group_overlaps_with_the_others() -> None:
    """The first group's taker waits for a later frame: it would wait for ever in turn."""
    model = make()
    prompts = [prompt(model, 1, 1), prompt(model, 1, 4)]
    engine, later = RolloutEngine(model), threading.Event()
    frame = engine._frame

    def watched(*arguments: object) -> None:
        frame(*arguments)
        if arguments[3][0].frame == 3:
            later.set()

    engine._frame = watched
    engine.rollout(prompts, seed=0, on_group=lambda *_: later.wait(60) or pytest.fail("in turn"))


def test_what_a_taker_raises_is_raised() -> None:
    model = make()

    def refuse(index: int, _: Trajectories) -> None:
        raise InputError(f"reward: no frames in group {index}")

    with pytest.raises(InputError, match="reward: no frames in group 0"):
        RolloutEngine(model).rollout([prompt(model, 1, 2)], seed=0, on_group=refuse)


@dtypes
@row_ends
def test_threads_that_share_products_change_no_bit(
    row_end: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("several blocks of keys")
    prompts = [prompt(model, 3, 3), prompt(model, 1, 2), prompt(model, 4, 5)]
    call = {"group_size": 9, "schedule": diagonal(3, row_end), "seed": 2}
    found = []
    for large in (2**60, 0):
        monkeypatch.setattr(engine_module, "_LARGE", large)
        for count in (1, 3):
            with threads(count):
                found.append(RolloutEngine(model, dtype).rollout(prompts, **call))
    for other in found[1:]:
        assert alike(found[0], other)


@dtypes
@row_ends
@pytest.mark.parametrize("window", [1, 2, None])
def test_a_clip_of_many_windows_is_scored_as_it_was_drawn(
    window: int | None, row_end: str, dtype: torch.dtype
) -> None:
    """Its cache is a ring, far smaller than the clip, and no place keeps its first frames."""
    model = make("several blocks of keys", frames=2)
    schedule = sequential() if window is None else diagonal(window, row_end)
    engine = RolloutEngine(model, dtype)
    call = {"prompts": [prompt(model, 1, 11), prompt(model, 2, 3)], "group_size": 2}
    longer = [prompt(model, 1, 22)]
    assert engine.memory(**call).rollout == engine.memory(longer, group_size=2).rollout
    drawn = engine.rollout(**call, schedule=schedule, seed=6)
    assert same(trajectory_logprob(model, drawn, dtype).detach(), drawn.logprob)
    unlimited = make("several blocks of keys", frames=12)
    unlimited.load_state_dict(model.state_dict())
    other = trajectory_logprob(unlimited, drawn, dtype).detach()
    assert same(other[:, :1], drawn.logprob[:, :1])
    assert not same(other, drawn.logprob), "what left the window is not seen"


@dtypes
@row_ends
def test_poison_is_never_seen(row_end: str, dtype: torch.dtype) -> None:
    model = make("several blocks of keys")
    prompts = [prompt(model, 3, 3), prompt(model, 1, 4)]  # 3 frames: whole blocks of the prompt
    call = {"group_size": 2, "schedule": diagonal(2, row_end), "seed": 8}
    engine = RolloutEngine(model, dtype)
    plain = engine.rollout(prompts, **call)
    with poisoned_caches():
        again = engine.rollout(prompts, **call)
    assert alike(plain, again)
    assert plain.logprob.isfinite().all()


@dtypes
@row_ends
@pytest.mark.parametrize("window", [2, None])
def test_greedy_is_the_teacher_forced_argmax(
    window: int | None, row_end: str, dtype: torch.dtype
) -> None:
    model = make("odd")
    schedule = sequential() if window is None else diagonal(window, row_end)
    drawn = RolloutEngine(model, dtype).rollout(
        [prompt(model, 1, 2)], schedule=schedule, sampling=greedy(), seed=0
    )
    with torch.no_grad(), torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        hidden = model.hidden(drawn.codes, drawn.actions, schedule=schedule)
        logits = model.lm_head(hidden)
    assert torch.equal(logits.argmax(-1), drawn.codes[:, 1:])
    assert same(trajectory_logprob(model, drawn, dtype).detach(), drawn.logprob)


# -- int8 --------------------------------------------------------------------------------------


def quantised(model: WorldModel) -> WorldModel:
    """The policy that int8 weights are, in floats."""
    out = make("several blocks of keys")
    out.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in out.decoder_layers():
            gate_up = layer.gate_up_proj.weight
            for weight in (
                layer.self_attn.qkv_proj.weight,
                layer.self_attn.o_proj.weight,
                *gate_up.chunk(2),
                layer.down_proj.weight,
            ):
                scale = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
    return out


def test_int8_weights_are_the_policy_that_they_round_to() -> None:
    model = make("several blocks of keys")
    prompts = [prompt(model, 1, 2, i) for i in range(2)]
    drawn = RolloutEngine(model, weights="int8").rollout(prompts, group_size=4, seed=5)
    assert not drawn.same_policy
    with torch.no_grad():
        near = compare(drawn.logprob, trajectory_logprob(quantised(model), drawn, torch.float32))
        far = compare(drawn.logprob, trajectory_logprob(model, drawn, torch.float32))
        rounding = RolloutEngine(model).rollout(prompts, group_size=4, seed=5)
        plain = compare(rounding.logprob, trajectory_logprob(model, rounding, torch.float32))
    assert near.kl < 4 * plain.kl, "no further off than bfloat16's rounding"
    assert far.kl > near.kl


def test_int8_weights_have_the_same_bits_everywhere() -> None:
    """On AMX, where products have bits of their own, with any number of threads."""
    model = make("odd")

    def drawn(isa: str, count: int) -> Trajectories:
        with instruction_set(isa), threads(count):
            engine = RolloutEngine(model, weights="int8")
            return engine.rollout([prompt(model, 1, 2)], group_size=5, seed=2)

    plain, *others = (isa for isa in instruction_sets() if isa != "amx")
    expected = drawn(plain, 1)
    for isa in (plain, *others):
        assert alike(expected, drawn(isa, 3 if isa == plain else 1))
    if "amx" in instruction_sets():
        assert alike(drawn("amx", 1), drawn("amx", 3))


def test_int8_weights_take_less_and_go_with_bfloat16() -> None:
    model = make("tiny", hidden=256, mlp=512)
    call = {"prompts": [prompt(model, 1, 2)]}
    plain, small = (RolloutEngine(model, weights=x).memory(**call) for x in ("dtype", "int8"))
    assert small.weights < 0.75 * plain.weights
    with pytest.raises(InputError, match="int8 weights must go with bfloat16"):
        RolloutEngine(model, torch.float32, weights="int8")
