"""Masks of the attention ops against brute force, and diagonal decoding against a simulation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit import examples
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import Mask, causal, diagonal, frame_causal, visible

# --- The definition of diagonal decoding ---------------------------------------------------------


def schedule(rows: int, columns: int, window: int, refresh: bool = False) -> list[list[int]]:
    """Diagonal decoding of one image: the slots that each step feeds, after the actions' step.

    Every row under way feeds its newest token and draws the next. Row r + 1 begins once row r has
    ``window`` tokens, by feeding a stand-in into slot C - 1 of row r, and so draws its first token.
    The last token of a row is fed, once drawn, only with ``refresh``, into slot C. The image's last
    token is another matter: the next action block brings it, so no step here.
    """
    across = columns + refresh
    drawn = [0] * rows
    drawn[0] = 1  # by the action block before the image
    refreshed: set[int] = set()
    steps = []
    while min(drawn) < columns:
        step = [(r, drawn[r] - 1, r) for r in range(rows) if 0 < drawn[r] < columns]
        for r in range(1, rows):
            if drawn[r] == 0 and drawn[r - 1] >= window:
                step.append((r - 1, columns - 1, r))
                break
        whole = [r for r in range(rows - 1) if drawn[r] == columns and r not in refreshed]
        if refresh:
            step += [(r, columns, None) for r in whole]
            refreshed.update(whole)
        for _, _, draws in step:
            if draws is not None:
                drawn[draws] += 1
        steps.append([r * across + c for r, c, _ in step])
    assert len(refreshed) == (rows - 1 if refresh else 0)
    return steps


def stand_ins(rows: int, columns: int) -> set[int]:
    """Slots of an image with refresh."""
    return {r * (columns + 1) + columns - 1 for r in range(rows - 1)}


def what_slots_saw(
    rows: int, columns: int, window: int, refresh: bool = False
) -> dict[int, set[int]]:
    """What each slot's query saw of its image: the cache holds what was fed, queries are causal.

    A row's last token, fed, drops the stand-in in the slot before it from the cache.
    """
    image = rows * (columns + refresh) - refresh
    saw: dict[int, set[int]] = {}
    cache: set[int] = set()
    for step in [*schedule(rows, columns, window, refresh), [image - 1]]:
        assert not saw.keys() & set(step), "each slot is fed once"
        cache.update(step)
        if refresh:
            cache -= {slot for slot in stand_ins(rows, columns) if slot + 1 in step}
        for query in step:
            saw[query] = {k for k in cache if k <= query}
    assert saw.keys() == set(range(image))
    return saw


SIZES = [
    *((r, c, w) for r in range(1, 6) for c in range(1, 7) for w in range(1, c + 1)),
    *((r, c, w) for r, c in ((2, 17), (9, 4), (14, 24)) for w in (1, 2, c // 2, c - 1, c)),
]


@pytest.mark.parametrize(("rows", "columns", "window"), SIZES)
def test_a_diagonal_mask_is_what_slots_saw(rows: int, columns: int, window: int) -> None:
    for refresh in (False, True)[: 1 + (window < columns)]:
        saw = what_slots_saw(rows, columns, window, refresh)
        mask = diagonal(rows, columns, window, context_frames=0, refresh=refresh)
        got = visible(mask, torch.arange(len(saw)), len(saw))
        for query, keys in saw.items():
            assert set(got[query].nonzero().flatten().tolist()) == keys, f"slot {query}, {refresh}"


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("window", [2, 4])
def test_the_simulation_takes_the_published_number_of_steps(window: int, refresh: bool) -> None:
    """24 + 13 w for a 14 x 24 image, among them the one that feeds the actions."""
    assert 1 + len(schedule(14, 24, window, refresh)) == 24 + 13 * window


def test_a_window_of_all_columns_is_causal() -> None:
    positions = torch.arange(50)
    mask = diagonal(3, 4, 4, action_tokens=2)
    assert visible(mask, positions, 50).equal(visible(causal(), positions, 50))


def test_a_stand_in_is_not_seen_by_what_came_before_it() -> None:
    """(0, 3) of a 2 x 4 image is fed when row 1 begins, before (0, 2): it does not see that."""
    got = visible(diagonal(2, 4, 2, context_frames=0), torch.arange(8), 8)
    assert got[3].tolist() == [True, True, False, True, *[False] * 4], "at (0, 3), fed at step 2"
    assert got[4].tolist() == [True, True, True, True, True, *[False] * 3], "at (1, 0), step 3"
    assert got[6].tolist() == [True] * 7 + [False]


def test_a_drawn_token_takes_the_place_of_its_stand_in() -> None:
    """Of a 2 x 4 image: slots 0 to 2, the stand-in 3, the drawn token 4, and row 1 in 5 to 8."""
    mask = diagonal(2, 4, 2, context_frames=0, refresh=True)
    got = visible(mask, torch.arange(18), 18)
    assert got[3, :4].tolist() == [True, True, False, True], "the stand-in, fed at step 2"
    assert got[4].tolist() == [True, True, True, False, True, *[False] * 13], "fed at step 4"
    assert got[5, :6].tolist() == [True, True, True, True, False, True], "(1, 0), at step 3"
    assert got[6, :7].tolist() == [True, True, True, False, True, True, True], "(1, 1), at step 4"
    assert got[9, :10].tolist() == [True] * 3 + [False] + [True] * 6, "the next frame"
    context = visible(diagonal(2, 4, 2, refresh=True), torch.arange(9), 9)
    assert context[:, 3].any().item() is False, "context holds no stand-in"
    assert context[3].tolist() == [True] * 3 + [False] * 6


# --- Brute force ---------------------------------------------------------------------------------


def slots_of(mask: Mask, count: int) -> list[tuple[int, int]]:
    """Frame of each position, and which slot of its image it is, or -1."""
    if mask.kind == "causal":
        return [(0, -1)] * count
    if mask.kind == "diagonal":
        rows, columns, _, action, *_, refresh = mask.numbers
        image = rows * (columns + refresh) - refresh
    else:
        image, action = mask.numbers[:2]
    stream = [(0, i) for i in range(image)]
    for frame in itertools.count(1):
        if len(stream) >= count:
            return stream[:count]
        stream += [(frame, -1)] * action + [(frame, i) for i in range(image)]
    raise AssertionError


def brute(mask: Mask, count: int) -> Tensor:
    stream = slots_of(mask, count)
    saw, never = {}, set()
    if mask.kind == "diagonal":
        refresh = bool(mask.numbers[6])
        saw = what_slots_saw(*mask.numbers[:3], refresh)
        never = stand_ins(*mask.numbers[:2]) if refresh else never
    out = torch.zeros(count, count, dtype=torch.bool)
    for q, (q_frame, q_slot) in enumerate(stream):
        for k, (k_frame, k_slot) in enumerate(stream):
            sees = k <= q
            same_image = q_frame == k_frame and q_slot >= 0 and k_slot >= 0
            if mask.kind == "causal":
                window = mask.numbers[0]
                sees = sees and (not window or q - k < window)
            elif mask.kind == "frame_causal":
                window = mask.numbers[2]
                sees = (sees or same_image) and (not window or q_frame - k_frame < window)
            else:
                window, context = mask.numbers[4:6]
                if same_image and q_frame >= context:
                    sees = k_slot in saw[q_slot]
                else:
                    sees = sees and k_slot not in never
                sees = sees and (not window or q_frame - k_frame < window)
            out[q, k] = sees
    return out


windows = st.none() | st.integers(1, 5)


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    kind = draw(st.sampled_from(["causal", "frame_causal", "diagonal"]))
    if kind == "causal":
        return causal(draw(windows))
    action = draw(st.integers(0, 4))
    if kind == "frame_causal":
        return frame_causal(draw(st.integers(1, 9)), action, draw(windows))
    columns = draw(st.integers(1, 5))
    rows, window = draw(st.integers(1, 4)), draw(st.integers(1, columns))
    refresh = window < columns and draw(st.booleans())
    context = draw(st.integers(0, 3))
    return diagonal(rows, columns, window, action, draw(windows), context, refresh)


@settings(max_examples=examples(100))
@given(mask=masks(), count=st.integers(0, 60))
def test_visible_is_brute_force(mask: Mask, count: int) -> None:
    assert visible(mask, torch.arange(count), count).equal(brute(mask, count))


FAR = (-(2**63), -(2**40), -7, -1, 10**6, 2**40, 2**62, 2**63 - 1)


@settings(max_examples=examples(100))
@given(mask=masks(), keys=st.integers(0, 60))
def test_positions_far_away(mask: Mask, keys: int) -> None:
    got = visible(mask, torch.tensor(FAR), keys)
    assert not got[:4].any()
    window = mask.numbers[{"causal": 0, "frame_causal": 2, "diagonal": 4}[mask.kind]]
    nothing = torch.zeros(keys, dtype=torch.bool)
    if mask.kind == "diagonal" and mask.numbers[6]:
        never = stand_ins(*mask.numbers[:2])
        nothing = torch.tensor([s in never for _, s in slots_of(mask, keys)], dtype=torch.bool)
    assert got[4:].equal((~nothing & (window == 0)).expand(4, keys))


@pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
@settings(max_examples=examples(200))
@given(mask=masks(), keys=st.integers(0, 60), seed=st.integers(0, 99))
def test_the_kernels_reach_is_visible(mask: Mask, keys: int, seed: int) -> None:
    some = torch.randint(-3, 80, (20,), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([some, torch.tensor(FAR)])
    got = torch.ops.rlir._reach.default(mask.kind, mask.numbers, positions, keys)
    assert got.equal(visible(mask, positions, keys))


def test_the_kernels_reach_is_visible_at_the_models_size() -> None:
    for mask in (
        diagonal(14, 24, 2, 11, 16),
        diagonal(14, 24, 4, 11, context_frames=3),
        diagonal(14, 24, 2, 11, 16, refresh=True),
        diagonal(14, 24, 4, 11, context_frames=3, refresh=True),
        frame_causal(336, 11, 2),
        causal(900),
    ):
        positions = torch.arange(0, 5552, 13)
        seen = visible(mask, positions, 5552)
        assert seen.any(-1).all()
        if _library.PATH is not None:
            got = torch.ops.rlir._reach.default(mask.kind, mask.numbers, positions, 5552)
            assert got.equal(seen)


def test_positions_may_have_any_shape() -> None:
    positions = torch.randint(0, 30, (2, 3, 4))
    got = visible(frame_causal(4, 2), positions, 30)
    assert got.shape == (2, 3, 4, 30)
    assert got.flatten(0, 2).equal(visible(frame_causal(4, 2), positions.flatten(), 30))


# --- Wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: causal(0), "causal: window_tokens must be an integer from 1 .* or None, got 0"),
        (lambda: causal(2.0), "causal: window_tokens must be an integer .* got 2.0"),
        (lambda: causal(2**31), "causal: window_tokens must be .* below 2\\^31 or None, got"),
        (lambda: frame_causal(0), "frame_causal: tokens_per_frame must be .* from 1 .* got 0"),
        (lambda: frame_causal(True), "frame_causal: tokens_per_frame must be .* got True"),
        (lambda: frame_causal(4, -1), "frame_causal: action_tokens must be .* from 0 .* got -1"),
        (lambda: frame_causal(4, None), "frame_causal: action_tokens must be .* got None"),
        (lambda: frame_causal(4, 1, -3), "frame_causal: window_frames must be .* got -3"),
        (lambda: diagonal(0, 4, 2), "diagonal: rows must be an integer from 1 .* got 0"),
        (lambda: diagonal(3, "4", 2), "diagonal: columns must be an integer from 1 .* got '4'"),
        (lambda: diagonal(3, 4, 0), "diagonal: window must be an integer from 1 .* got 0"),
        (lambda: diagonal(3, 4, 5), "diagonal: window must be <= columns, got 5 > 4"),
        (lambda: diagonal(3, 4, 2, context_frames=-1), "diagonal: context_frames must be .* -1"),
        (lambda: diagonal(2**20, 2**20, 2), "diagonal: rows x columns must be below 2\\^31, got"),
        (
            lambda: diagonal(3, 715827882, 2, refresh=True),
            "diagonal: rows .* a slot more a row, got",
        ),
        (lambda: diagonal(3, 4, 2, refresh=1), "diagonal: refresh must be True or False, got 1"),
        (
            lambda: diagonal(3, 4, 4, refresh=True),
            "diagonal: window must be < columns with refresh, ",
        ),
        (
            lambda: Mask("diagonal", (3, 4, 2, 0, 0, 1, 2)),
            "diagonal: refresh must be 0 or 1, got 2",
        ),
        (
            lambda: Mask("diagonal", (3, 4, 2, 0, 0, 1)),
            r"diagonal: numbers must be \(rows, .*refresh",
        ),
        (lambda: Mask("none", ()), "Mask: kind must be one of causal, .*, got 'none'"),
        (lambda: Mask("causal", ()), r"causal: numbers must be \(window_tokens\), got \(\)"),
        (lambda: Mask("causal", [1]), r"causal: numbers must be \(window_tokens\), got \[1\]"),
        (lambda: Mask("causal", (-1,)), "causal: window_tokens must be an integer from 0 .* -1"),
    ],
)
def test_wrong_arguments(make, line: str) -> None:
    with pytest.raises(InputError, match=f"^{line}") as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
@pytest.mark.parametrize(
    ("kind", "numbers", "line"),
    [
        ("none", [], "mask must be 'causal', 'frame_causal' or 'diagonal', got 'none'"),
        ("causal", [1, 2], "mask_numbers of 'causal' must be 1, got 2"),
        ("frame_causal", [0, 1, 2], "a frame of the mask must have from 1 .* got 0"),
        ("frame_causal", [4, -1, 2], r"mask_numbers must be from 0 and below 2\^31, got -1"),
        ("causal", [2**31], r"mask_numbers must be from 0 and below 2\^31, got 2147483648"),
        ("diagonal", [3, 4, 5, 0, 0, 1, 0], "the window of 'diagonal' must be .* columns 4, got 5"),
        ("diagonal", [3, 4, 0, 0, 0, 1, 0], "the window of 'diagonal' must be .* columns 4, got 0"),
        ("diagonal", [3, 4, 2, 0, 0, 1], "mask_numbers of 'diagonal' must be 7, got 6"),
        ("diagonal", [3, 4, 2, 0, 0, 1, 2], "the refresh of 'diagonal' must be 0 or 1, got 2"),
        (
            "diagonal",
            [3, 4, 4, 0, 0, 1, 1],
            "the window .* below its columns 4 with refresh, got 4",
        ),
        (
            "diagonal",
            [2**20, 2**20, 1, 0, 0, 1, 0],
            "a frame of the mask must have .* below 2\\^31",
        ),
    ],
)
def test_wrong_arguments_of_the_operator(kind: str, numbers: list[int], line: str) -> None:
    with pytest.raises(RuntimeError, match=f"^_reach: {line}"):
        torch.ops.rlir._reach.default(kind, numbers, torch.arange(3), 4)
