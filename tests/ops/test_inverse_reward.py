"""inverse_reward: the reference, CPU and CUDA kernels against the formula in plain Python."""

import math

import pytest
import torch
from action_cases import DTYPES, HEADS, commands_of, logits_of, read_by_hand, wanted_by_hand
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from testkit import examples, same
from torch import Tensor

from rlir.actions import DOOM, MINECRAFT, MINECRAFT_VPT, ActionHeads
from rlir.errors import InputError
from rlir.ops import (
    Actions,
    decode_actions,
    group_advantage,
    inverse_reward,
    inverse_reward_reference,
)

CHECKED = Backend("emu-checked", inverse_reward)
backends = backends_of(inverse_reward, inverse_reward_reference)
heads_of_all = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
VPT = MINECRAFT_VPT


@backends
@heads_of_all
@pytest.mark.parametrize("mode", ["factor", "joint"])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_formula(op: Backend, heads: ActionHeads, mode: str, masked: bool) -> None:
    b, t = 5, 13
    keys, camera = logits_of(heads, b, t)
    commands = commands_of(heads, b, t)
    # Make some of them obey, or a joint match would never be seen.
    read = decode_actions(keys, camera, heads).classes
    sizes = torch.tensor(heads.space.factor_sizes)
    obey = (torch.arange(b * t).view(b, t, 1) % 3 == 0) & (read < sizes)
    commands = torch.where(obey, read, commands)
    weights = [0.25 * (f % 4) for f in range(len(sizes))]
    weights[0] = 2.0
    mask = torch.arange(b * t).view(b, t) % 4 != 1 if masked else None
    reward, matches = op(keys, camera, commands, heads, mode=mode, weights=weights, frame_mask=mask)
    assert (reward.dtype, matches.dtype) == (torch.float32, torch.float32)
    assert matches.shape == (b, t, len(sizes))
    for i in range(b):
        score, frames = 0.0, 0
        for j in range(t):
            if mask is not None and not mask[i, j]:
                assert matches[i, j].tolist() == [0] * len(sizes)
                continue
            row = [None if x is None else x[i, j] for x in (keys, camera)]
            hit = read_by_hand(*row, heads) == wanted_by_hand(commands[i, j], heads)
            assert matches[i, j].tolist() == hit.float().tolist()
            frames += 1
            if mode == "factor":
                score += sum(w * h for w, h in zip(weights, hit.tolist(), strict=True))
            else:
                score += all(h for w, h in zip(weights, hit.tolist(), strict=True) if w)
        total = sum(weights) if mode == "factor" else 1
        assert float(reward[i]) == pytest.approx(score / total / frames, rel=2e-7)


@backends
@heads_of_all
def test_obeying_is_one_and_what_is_read_obeys_itself(op: Backend, heads: ActionHeads) -> None:
    keys, camera = logits_of(heads, 4, 6)
    actions = decode_actions(keys, camera, heads)
    reward, matches = op(keys, camera, actions, heads)  # degrees stand for camera classes
    assert reward.eq(1).all()
    assert matches.eq(1).all()
    assert op(keys, camera, actions, heads, mode="joint")[0].eq(1).all()


@backends
@pytest.mark.parametrize(
    ("degrees", "bin_"),
    [(0.0, 5), (0.2, 5), (0.4, 6), (-0.4, 4), (3.0, 8), (9.0, 10), (90.0, 10), (-90.0, 0)],
)
def test_commanded_degrees_are_quantised_with_the_heads_bins(
    op: Backend, degrees: float, bin_: int
) -> None:
    camera = torch.zeros(1, 1, 2, 11)
    camera[..., 0, bin_] = 1
    camera[..., 1, 5] = 1
    command = Actions(torch.zeros(1, 1, 9, dtype=torch.int64), torch.tensor([[[degrees, 0.0]]]))
    _, matches = op(torch.zeros(1, 1, 20, 2), camera, command, VPT)
    assert matches[0, 0, :2].tolist() == [1, 1]


@backends
def test_a_commanded_key_without_a_button_asks_for_none(op: Backend) -> None:
    command = torch.zeros(1, 1, 9, dtype=torch.int64)
    command[..., :2] = 10
    command[..., 8] = 2  # pickItem
    camera = torch.zeros(1, 1, 2, 11)
    camera[..., 5] = 1
    assert op(torch.zeros(1, 1, 20, 2), camera, command, VPT)[0].tolist() == [1]


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["factor", "joint"])
def test_what_cannot_be_read_has_no_reward(op: Backend, value: float, mode: str) -> None:
    keys, camera = logits_of(HEADS["doom"], 4, 3)
    commands = commands_of(HEADS["doom"], 4, 3)
    clean, _ = op(keys, camera, commands, DOOM, mode=mode)
    assert keys is not None
    keys[2, 1, 4] = value
    # Not even a factor without weight may hide it.
    reward, matches = op(keys, camera, commands, DOOM, mode=mode, weights=[1, 1, 0, 1])
    assert reward.isnan().tolist() == [False, False, True, False]
    assert matches.isnan().nonzero().tolist() == [[2, 1, 2]]
    reward, _ = op(keys, camera, commands, DOOM, mode=mode)
    assert reward[[0, 1, 3]].equal(clean[[0, 1, 3]])
    assert group_advantage(reward, group_size=4)[2] == 0
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2, 1] = False
    reward, matches = op(keys, camera, commands, DOOM, mode=mode, frame_mask=mask)
    assert reward.isfinite().all()
    assert matches[2, 1].eq(0).all()


@backends
def test_no_frames_no_evidence(op: Backend) -> None:
    keys, camera = logits_of(VPT, 3, 4)
    commands = commands_of(VPT, 3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    commands[1] = -7  # padding may be anything
    reward, matches = op(keys, camera, commands, VPT, frame_mask=mask)
    assert reward.isnan().tolist() == [False, True, False]
    assert matches.isfinite().all()
    for b, t in ((0, 4), (3, 0), (0, 0)):
        keys, camera = logits_of(VPT, b, t)
        reward, matches = op(keys, camera, commands_of(VPT, b, t), VPT)
        assert reward.shape == (b,)
        assert reward.isnan().all()
        assert matches.shape == (b, t, 9)


@settings(max_examples=examples(40), deadline=None)
@given(
    name=st.sampled_from(sorted(HEADS)),
    b=st.integers(0, 70),
    t=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
    mode=st.sampled_from(["factor", "joint"]),
    masked=st.booleans(),
    layout=st.sampled_from(["plain", "step", "moved"]),
)
def test_any_layout(
    name: str, b: int, t: int, dtype: torch.dtype, seed: int, mode: str, masked: bool, layout: str
) -> None:
    heads = HEADS[name]

    def laid_out(x: Tensor | None) -> Tensor | None:
        if x is None or layout == "plain":
            return x
        if layout == "step":
            return torch.stack([x, x, x], -1).flatten(-2)[..., 1::3]
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    keys, camera = map(laid_out, logits_of(heads, b, t, dtype=dtype, seed=seed))
    commands = laid_out(commands_of(heads, b, t, seed=seed))
    g = torch.Generator().manual_seed(seed)
    mask = laid_out(torch.rand(b, t, generator=g) < 0.7) if masked else None
    got = inverse_reward(keys, camera, commands, heads, mode=mode, frame_mask=mask)
    peer = inverse_reward_reference(keys, camera, commands, heads, mode=mode, frame_mask=mask)
    torch.testing.assert_close(got[0], peer[0], rtol=2e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(got[1], peer[1], rtol=0, atol=0, equal_nan=True)
    if b <= 16:  # the emulator runs one thread after another
        again = CHECKED(keys, camera, commands, heads, mode=mode, frame_mask=mask)
        assert same(again, got)


def test_bits_do_not_depend_on_the_rest_of_the_batch() -> None:
    keys, camera = logits_of(VPT, 80, 11)
    commands = commands_of(VPT, 80, 11)
    weights = [0.1 * f + 0.3 for f in range(9)]
    whole = inverse_reward(keys, camera, commands, VPT, weights=weights)
    assert keys is not None
    assert camera is not None
    for i in range(80):
        alone = inverse_reward(
            keys[i : i + 1], camera[i : i + 1], commands[i : i + 1], VPT, weights=weights
        )
        assert alone[0].equal(whole[0][i : i + 1])
        assert alone[1].equal(whole[1][i : i + 1])


@heads_of_all
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_cuda_kernel_gives_the_bits_of_the_cpu(heads: ActionHeads, dtype: torch.dtype) -> None:
    keys, camera = logits_of(heads, 7, 9, dtype=dtype)
    first = camera if keys is None else keys
    assert first is not None
    first[3, 5] = math.nan
    commands = commands_of(heads, 7, 9)
    weights = [0.1 * f + 0.3 for f in range(commands.shape[-1])]
    turned = torch.linspace(-20, 20, 63 * len(heads.axes)).view(7, 9, -1)
    for wanted in (commands, Actions(commands, turned)):
        want = inverse_reward(keys, camera, wanted, heads, weights=weights)
        assert same(CHECKED(keys, camera, wanted, heads, weights=weights), want)


@pytest.mark.parametrize("nan", [False, True])
def test_the_cuda_kernel_asserts_what_it_cannot_say(nan: bool) -> None:
    given = Actions(A, torch.full((2, 3, 2), math.nan)) if nan else BAD
    with pytest.raises(InputError, match="device assertion: inverse_reward: actions must be"):
        CHECKED(K, C, given, VPT)


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    assert_same_bits_everywhere("action_cases.py")


def raw_options(heads: ActionHeads) -> dict:
    t = heads.tables
    names = ("axis_sizes", "group_sizes", "button_classes", "button_opponents", "edges")
    more = ("command_sizes", "command_classes")
    options = {name: getattr(t, name) for name in (*names, *more)}
    return {**options, "weights": [1.0] * len(t.command_sizes)}


def test_opcheck() -> None:
    for heads in (VPT, HEADS["doom"]):
        for shape in ((3, 4), (0, 4)):  # opcheck takes NaN for a difference: no (3, 0)
            keys, camera = logits_of(heads, *shape)
            commands = commands_of(heads, *shape)
            degrees = torch.zeros(*shape, len(heads.axes))
            mask = torch.ones(shape, dtype=torch.bool)
            op = torch.ops.rlir.inverse_reward.default
            options = raw_options(heads)
            torch.library.opcheck(op, (keys, camera, commands, degrees, mask), options)
            torch.library.opcheck(op, (keys, camera, commands), {**options, "mode": "joint"})


def test_compiles_once_for_all_sizes() -> None:
    def step(keys: Tensor, camera: Tensor, commands: Tensor, mask: Tensor) -> Tensor:
        reward, matches = inverse_reward(keys * 2, camera, commands, VPT, frame_mask=mask)
        return reward + matches.sum((1, 2))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, t, stance in ((3, 5, "default"), (4, 7, "fail_on_recompile")):
        keys, camera = torch.randn(b, t, 20, 2), torch.randn(b, t, 2, 11)
        args = (keys, camera, commands_of(VPT, b, t), torch.ones(b, t, dtype=torch.bool))
        with torch.compiler.set_stance(stance):
            assert compiled(*args).equal(step(*args))


K, C, A = torch.zeros(2, 3, 20, 2), torch.zeros(2, 3, 2, 11), torch.zeros(2, 3, 9).long()
ONES = [1.0] * 9
BAD = A.clone()
BAD[1, 2, 4] = 3
HOSTILE: list[tuple[tuple, dict, str]] = [
    ((K[0], C[0], A), {}, "logits must be [trajectories, frames, ...], got leading shape (3,)"),
    ((K, C, A.int()), {}, "actions must be torch.int64, got torch.int32"),
    ((K, C, A[..., :8]), {}, "actions must have shape (2, 3, 9), got (2, 3, 8)"),
    ((K, C, A.to("meta")), {}, "actions must be on cpu, got meta"),
    ((K, C, Actions(A, C[..., 0, :2].double())), {}, "degrees must be torch.float32, got"),
    ((K, C, Actions(A, torch.zeros(2, 3, 3))), {}, "degrees must have shape (2, 3, 2), got"),
    ((K, C, Actions(A, torch.full((2, 3, 2), math.nan))), {}, "degrees must not be NaN, got NaN"),
    ((K, C, A - 1), {}, "actions of factor 0 must be from 0 and below 21, got -1"),
    ((K, C, BAD), {}, "actions of factor 4 must be from 0 and below 3, got 3"),
    ((K, C, A), {"frame_mask": A[..., 0]}, "frame_mask must be torch.bool, got torch.int64"),
    ((K, C, A), {"frame_mask": A[:, :2, 0] > 0}, "frame_mask must have shape (2, 3), got (2, 2)"),
    ((K, C, A), {"weights": ONES[:8]}, "weights must be 9 numbers, got 8"),
    ((K, C, A), {"weights": [*ONES[:8], -1]}, "weights must be finite and >= 0, got -1.0"),
    ((K, C, A), {"weights": [*ONES[:8], math.nan]}, "weights must be finite and >= 0, got nan"),
    ((K, C, A), {"weights": [0.0] * 9}, "weights must have a finite sum above 0, got 0.0"),
    ((K, C, A), {"mode": "any"}, "mode must be 'factor' or 'joint', got 'any'"),
]


@backends
@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_hostile_inputs(op: Backend, args: tuple, options: dict, message: str) -> None:
    of_values = message.startswith(("actions of factor", "degrees must not be"))
    if op.name == "cuda" and ("meta" in message or of_values):
        pytest.skip("the message names the device, or comes at the next synchronisation")
    if op.is_emulated and of_values:
        pytest.skip("a kernel cannot say which; another test looks")
    with pytest.raises(InputError) as caught:
        op(*args, VPT, **options)
    assert str(caught.value).startswith(f"inverse_reward: {message}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command_sizes": [21] * 9}, "command_sizes must"),
        ({"command_classes": [11] * 71}, "command_classes must be classes of their head, got 11"),
        ({"edges": []}, "edges must be 10, got 0"),
        ({"weights": [1.0]}, "weights must be 9 numbers, got 1"),
        ({"weights": [math.inf] * 9}, "weights must be finite and >= 0, got inf"),
        ({"mode": "x"}, "mode must be 'factor' or 'joint', got 'x'"),
    ],
)
def test_raw_operator_is_safe_from_hostile_lists(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ops.rlir.inverse_reward.default(
            K.flatten(-2), C.flatten(-2), A, **{**raw_options(VPT), **change}
        )
    assert str(caught.value).startswith(f"inverse_reward: {message}")


def test_raw_operator_refuses_tensors_that_do_not_fit() -> None:
    keys, camera, options = K.flatten(-2), C.flatten(-2), raw_options(VPT)
    for args, message in (
        ((keys[0], camera, A), "button_logits must have shape"),
        ((keys, camera[:1], A), "camera_logits must have the trajectories and frames of"),
        ((keys.long(), camera, A), "button_logits must be float64, float32, bfloat16 or float16"),
        ((keys, camera, A[:1]), "actions must have shape [2, 3, 9]"),
        ((keys, camera, A, torch.zeros(2, 3, 1)), "degrees must have shape [2, 3, 2]"),
        ((keys, camera, A, None, A[..., 0]), "frame_mask must be of dtype"),
    ):
        with pytest.raises(RuntimeError) as caught:
            torch.ops.rlir.inverse_reward.default(*args, **options)
        assert str(caught.value).startswith(f"inverse_reward: {message}")


def test_mineworlds_bins_reach_vpts_by_their_centres() -> None:
    tables = VPT.tables
    assert tables.command_sizes == MINECRAFT.factor_sizes
    pitch = tables.command_classes[:21]
    assert pitch[10] == 5
    assert pitch == tuple(sorted(pitch))
    assert pitch[0] == 0
    assert pitch[20] == 10
