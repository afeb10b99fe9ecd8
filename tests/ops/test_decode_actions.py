"""decode_actions: the reference, CPU and CUDA kernels against a reading in plain Python."""

import numpy as np
import pytest
import torch
from action_cases import DTYPES, HEADS, logits_of, read_by_hand
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit import examples, same

from rlir.actions import DOOM, MINECRAFT_VPT, ActionHeads
from rlir.errors import InputError
from rlir.ops import decode_actions, decode_actions_reference

CHECKED = Backend("emu-checked", decode_actions)
backends = backends_of(decode_actions, decode_actions_reference)
heads_of_all = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

VPT = MINECRAFT_VPT
INDEX = {key: i for i, key in enumerate(VPT.buttons or ())}
NAMES = [group.name for group in VPT.space.groups]


@backends
@heads_of_all
@dtypes
def test_reads_what_a_reading_by_hand_does(
    op: Backend, heads: ActionHeads, dtype: torch.dtype
) -> None:
    keys, camera = logits_of(heads, 9, 11, dtype=dtype)
    classes, degrees = op(keys, camera, heads)
    assert (classes.dtype, degrees.dtype) == (torch.int64, torch.float32)
    assert degrees.shape == (9, 11, len(heads.axes))
    for i in range(9):
        for j in range(11):
            row = [None if x is None else x[i, j] for x in (keys, camera)]
            assert classes[i, j].equal(read_by_hand(*row, heads))
    for f, axis in enumerate(heads.axes):
        centres = axis.centres()[classes[..., f].numpy()].astype(np.float32)
        np.testing.assert_array_equal(degrees[..., f].numpy(), centres)


def vpt_logits(*held: str) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.zeros(20, 2)
    keys[:, 0] = 1
    for key in held:
        keys[INDEX[key]] = torch.tensor([0.0, 0.5])
    camera = torch.zeros(2, 11)
    camera[:, 5] = 1
    return keys, camera


@backends
@pytest.mark.parametrize(
    ("held", "group", "expected"),
    [
        (["key.keyboard.w"], "forward_back", 1),
        (["key.keyboard.w", "key.keyboard.s"], "forward_back", 0),
        (["mouse.0", "mouse.1"], "use_attack", 0),
        (["mouse.0"], "use_attack", 2),
        (["key.keyboard.space", "key.keyboard.left.shift"], "jump", 0),
        (["key.keyboard.space", "key.keyboard.left.shift"], "sprint_sneak", 0),
        (["key.keyboard.space", "key.keyboard.left.control"], "sprint_sneak", 1),
        (["key.keyboard.q"], "drop_pick", 1),
        (["key.keyboard.9"], "hotbar", 9),
        (["key.keyboard.1", "key.keyboard.9"], "hotbar", 0),
        (["key.keyboard.e"], "hotbar", 0),
    ],
)
def test_vpts_buttons_cancel_as_in_mineworld(
    op: Backend, held: list[str], group: str, expected: int
) -> None:
    classes, degrees = op(*vpt_logits(*held), VPT)
    assert classes[2 + NAMES.index(group)] == expected
    assert classes[:2].tolist() == [5, 5]
    assert degrees.tolist() == [0, 0]


@backends
def test_equal_logits_are_the_first_class_and_not_held(op: Backend) -> None:
    classes, _ = op(torch.zeros(20, 2), torch.zeros(2, 11), VPT)
    assert classes.tolist() == [0] * 9
    assert op(torch.zeros(8), torch.zeros(11), DOOM).classes.tolist() == [0] * 4


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@dtypes
def test_a_logit_that_is_not_finite_cannot_be_read(
    op: Backend, value: float, dtype: torch.dtype
) -> None:
    step = 7 if op.is_emulated else 1
    for last in range(0, 40, step):
        keys, camera = (x.to(dtype).repeat(3, 1, 1) for x in vpt_logits("mouse.0"))
        keys.view(3, 40)[1, last] = value
        classes, degrees = op(keys, camera, VPT)
        assert classes[1].tolist() == [5, 5, *[-1] * 7]
        assert (classes[[0, 2]] >= 0).all()
        assert degrees.isfinite().all()
    for last in range(0, 22, step):
        keys, camera = (x.to(dtype).repeat(3, 1, 1) for x in vpt_logits("mouse.0"))
        camera.view(3, 22)[1, last] = value
        classes, degrees = op(keys, camera, VPT)
        assert (classes[1] < 0).tolist() == [last < 11, last >= 11, *[False] * 7]
        assert degrees[1].isnan().tolist() == [last < 11, last >= 11]
    keys, camera = torch.zeros(8), torch.zeros(11)
    keys[4] = value  # of the second key group: class vectors stand each for itself
    assert op(keys, camera, DOOM).classes.tolist() == [0, 0, -1, 0]


def test_float64_is_not_rounded() -> None:
    camera = torch.zeros(1, 11, dtype=torch.float64)
    camera[0, 7] = 1e-12
    keys = torch.zeros(1, 8)
    assert decode_actions(keys, camera, DOOM).classes.tolist() == [[7, 0, 0, 0]]


@settings(max_examples=examples(40), deadline=None)
@given(
    name=st.sampled_from(sorted(HEADS)),
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layout=st.sampled_from(["plain", "step", "moved", "expanded"]),
    seed=st.integers(0, 999),
)
def test_any_layout(
    name: str,
    shape: list[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: str,
    seed: int,
) -> None:
    heads = HEADS[name]
    parts = []
    for x, dtype in zip(logits_of(heads, *shape, seed=seed), dtypes, strict=True):
        if x is None:
            parts.append(None)
            continue
        x = x.to(dtype)
        if layout == "step":
            x = torch.stack([x, -x, x], -1).flatten(-2)[..., ::3]
        elif layout == "moved":
            x = x.movedim(-1, 0).contiguous().movedim(0, -1)
        elif layout == "expanded" and shape:
            x = x[:1].expand(x.shape) if shape[0] else x
        parts.append(x)
    got, peer = decode_actions(*parts, heads), decode_actions_reference(*parts, heads)
    assert got.classes.shape == (*shape, len(heads.sizes))
    assert got.classes.equal(peer.classes)
    assert got.degrees.equal(peer.degrees)
    if got.classes.numel() <= 2000:  # the emulator runs one thread after another
        assert same(CHECKED(*parts, heads), got)


def raw_options(heads: ActionHeads) -> dict:
    t = heads.tables
    names = ("axis_sizes", "group_sizes", "button_classes", "button_opponents", "centres")
    return {name: getattr(t, name) for name in names}


def test_opcheck() -> None:
    for heads in (VPT, HEADS["doom"]):
        for shape in ((3, 4), (0, 4), (3, 0)):
            keys, camera = logits_of(heads, *shape)
            torch.library.opcheck(
                torch.ops.rlir.decode_actions.default, (keys, camera), raw_options(heads)
            )


def test_compiles_once_for_all_sizes() -> None:
    def step(keys: torch.Tensor, camera: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        classes, degrees = decode_actions(keys * 2, camera, VPT)
        return classes + 1, degrees

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, t, stance in ((3, 5, "default"), (4, 7, "fail_on_recompile")):
        keys, camera = torch.randn(b, t, 20, 2), torch.randn(b, t, 2, 11)
        with torch.compiler.set_stance(stance):
            for got, expected in zip(compiled(keys, camera), step(keys, camera), strict=True):
                assert got.equal(expected)


K, C = torch.zeros(3, 20, 2), torch.zeros(3, 2, 11)
HOSTILE = [
    ((K.long(), C), "button_logits must be float64, float32, bfloat16 or float16, got torch.int64"),
    (
        (K[:, :19], C),
        "button_logits must have shape [..., 20, 2] or [..., 40], got (3, 19, 2)",
    ),
    ((K, C[..., :10]), "camera_logits must have shape [..., 2, 11] or [..., 22], got (3, 2, 10)"),
    ((K, C[:2]), "camera_logits must have the leading shape of button_logits, (3,), got (2,)"),
    ((None, C), "button_logits must be a tensor, got None"),
    ((K, C.to("meta")), "camera_logits must be on cpu, got meta"),
]


@backends
@pytest.mark.parametrize(("args", "message"), HOSTILE)
def test_hostile_inputs(op: Backend, args: tuple, message: str) -> None:
    if op.name == "cuda" and "meta" in message:
        pytest.skip("the message names the device")
    with pytest.raises(InputError) as caught:
        op(*args, VPT)
    assert str(caught.value) == f"decode_actions: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis_sizes": [11, 12]}, "camera_logits must have shape"),
        ({"axis_sizes": [22, 0]}, "axis_sizes must be >= 1, got 0"),
        ({"group_sizes": [10, 3]}, "button_classes must be -1 or a class of a group, got"),
        ({"button_opponents": [0] * 19}, "button_opponents must have 20 elements, got 19"),
        ({"button_opponents": [0] * 20}, "button_opponents must name the other keys of a group"),
        ({"centres": [0.0]}, "centres must be 22, got 1"),
        ({"button_classes": [-2] * 20}, "button_classes must be -1 or a class of a group, got -2"),
        ({"button_classes": [0] * 64, "button_opponents": [0] * 64}, "buttons must be at most 63"),
    ],
)
def test_raw_operator_is_safe_from_hostile_lists(change: dict, message: str) -> None:
    keys, camera = logits_of(VPT, 2, 2)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.rlir.decode_actions.default(keys, camera, **{**raw_options(VPT), **change})
    assert str(caught.value).startswith(f"decode_actions: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_the_cuda_kernel_refuses_more_than_fits_its_parameters() -> None:
    options = {"group_sizes": [], "button_classes": [], "button_opponents": []}
    bins = {"axis_sizes": [513], "centres": [0.0] * 513}
    many = {"axis_sizes": [1] * 65, "centres": [0.0] * 65}
    for sizes, message in (
        (bins, "camera_logits must have at most 512 bins on CUDA, got 513"),
        (many, "heads must have at most 64 factors on CUDA, got 65"),
    ):
        camera = torch.zeros(1, 1, len(sizes["centres"]))
        torch.ops.rlir.decode_actions(camera[..., :0], camera, **options, **sizes)
        with CHECKED.active(), pytest.raises(RuntimeError) as caught:
            torch.ops.rlir.decode_actions(camera[..., :0], camera, **options, **sizes)
        assert str(caught.value) == f"decode_actions: {message}"


def test_heads_refuse_what_does_not_fit_the_space() -> None:
    with pytest.raises(InputError, match=r"axes must be \('yaw',\) as in the space, got \(\)"):
        ActionHeads(DOOM, ())
    with pytest.raises(InputError, match="buttons must be 1 to 63 different keys"):
        ActionHeads(DOOM, DOOM.axes, ("a", "a"))


def test_compiles_for_a_space_by_itself() -> None:
    def step(keys: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
        return decode_actions(keys, camera, DOOM).degrees * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    keys, camera = torch.randn(3, 4, 8), torch.randn(3, 4, 11)
    assert compiled(keys, camera).equal(step(keys, camera))
