"""A schedule's plan is what its rules say, played step by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlir.errors import InputError
from rlir.ops import visible
from rlir.rollout.layout import layout_of
from rlir.rollout.schedule import Plan, diagonal, sequential

sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.booleans())


def plan_of(rows: int, columns: int, window: int, refresh: bool) -> Plan:
    return diagonal(window, "refresh" if refresh else "prompt").plan(rows, columns)


def play(rows: int, columns: int, window: int, refresh: bool) -> list[set[tuple]]:
    """What is fed at each step after the action block, by the rules alone.

    A feed is (row, column, whether it stands in, the place it predicts or -1).
    """
    window = min(window, columns)
    have = [0] * rows  # tokens of each row
    have[0] = 1  # the action block predicts the first
    stood_in, again = set(), set()
    steps = []
    while sum(have) < rows * columns:
        before, fed = list(have), set()
        for r in range(rows):
            if 0 < before[r] < columns:
                fed.add((r, before[r] - 1, False, r * columns + before[r]))
                have[r] += 1
            if r + 1 < rows and before[r] >= window and before[r + 1] == 0:
                drawn = before[r] == columns
                fed.add((r, columns - 1, not drawn, (r + 1) * columns))
                have[r + 1] += 1
                stood_in |= set() if drawn else {r}
            elif refresh and before[r] == columns and r in stood_in - again:
                fed.add((r, columns - 1, False, -1))
                again.add(r)
        steps.append(fed)
    return steps


def fed_at(plan: Plan, step: int) -> set[tuple]:
    return {
        (*divmod(feed.place, plan.columns), feed.stands_in, feed.predicts)
        for feed in plan.feeds
        if feed.step == step
    }


@given(sizes)
def test_the_plan_is_what_the_rules_say(case: tuple[int, int, int, bool]) -> None:
    plan = plan_of(*case)
    played = play(*case)
    assert plan.steps == len(played) + 1
    assert [fed_at(plan, i + 1) for i in range(len(played))] == played
    assert plan.raster == (case[2] >= plan.columns)


@given(sizes)
def test_what_is_fed_has_been_drawn_and_all_is_drawn_once(case: tuple) -> None:
    plan = plan_of(*case)
    drawn_at = plan.step_of()
    for feed in plan.feeds:
        assert feed.stands_in or drawn_at[feed.place] < feed.step
        assert not feed.stands_in or drawn_at[feed.place] >= feed.step, "else the token is there"
    predicted = [0, *(feed.predicts for feed in plan.feeds if feed.predicts >= 0)]
    assert sorted(predicted) == list(range(plan.rows * plan.columns))
    assert max(drawn_at) == plan.steps - 1


@given(sizes)
def test_slots_are_in_raster_order_stand_ins_before_true_tokens(case: tuple) -> None:
    plan = plan_of(*case)
    ordered = sorted(plan.feeds, key=lambda feed: feed.slot)
    assert [feed.slot for feed in ordered] == list(range(plan.slots - 1)), "the last is not fed"
    keys = [(feed.place, not feed.stands_in) for feed in ordered]
    assert keys == sorted(keys)
    true = {feed.place: feed.slot for feed in plan.feeds if not feed.stands_in}
    if plan.refresh or plan.raster:
        for place in range(plan.rows * plan.columns - 1):
            assert plan.slot_of(place) == true[place]
    assert plan.slot_of(plan.rows * plan.columns - 1) == plan.slots - 1


@pytest.mark.parametrize("window", [1, 2, 4, 8, 16, 23, 24, 30])
def test_steps_of_mineworlds_image(window: int) -> None:
    plan = diagonal(window).plan(14, 24)
    assert plan.steps == 24 + 13 * min(window, 24)
    assert sequential().plan(14, 24).steps == 14 * 24


@given(sizes.filter(lambda case: not case[3]), st.integers(1, 2))
def test_the_mask_shows_what_had_been_fed(case: tuple, context: int) -> None:
    """Earlier frames, and of its own what came before it in raster order and was fed by then."""
    plan, actions, frames = plan_of(*case), 2, 3
    layout = layout_of(plan, actions, frames, context)
    n = len(layout.token)
    step = torch.zeros(n, dtype=torch.int64)  # of each slot, over the whole clip
    frame = torch.zeros(n, dtype=torch.int64)
    for f in range(frames):
        start = layout.image(f)
        frame[max(0, start - actions) : start + plan.slots] = f
        if f >= context:
            for number, fed in enumerate(layout.steps(f)):
                step[torch.from_numpy(fed.slots)] = f * 1000 + number
    step[n - 1] = frames * 1000
    q, k = torch.arange(n)[:, None], torch.arange(n)
    expected = (k <= q) & (step[k] <= step[q])
    expected &= (frame[q] - frame[k]) < 2
    assert torch.equal(visible(plan.mask(actions, context, 2), torch.arange(n), n), expected)


@given(sizes, st.integers(1, 3))
def test_every_slot_is_fed_once(case: tuple, context: int) -> None:
    plan, actions, frames = plan_of(*case), 2, 4
    layout = layout_of(plan, actions, frames, context)
    fed = [slot for f in range(context, frames) for x in layout.steps(f) for slot in x.slots]
    start = layout.image(context) - actions
    assert sorted(fed) == list(range(start, len(layout.token) - 1))
    assert all(layout.fed[fed])
    for f in range(context, frames):
        for step in layout.steps(f):
            for slot, place in zip(step.slots[step.predicting], step.places, strict=True):
                assert layout.predicts[f - 1, place] == slot


def test_positions_are_those_of_raster_order() -> None:
    for plan in (sequential().plan(2, 3), diagonal(1).plan(2, 3)):
        assert layout_of(plan, 2, 3, 1).position.tolist() == list(range(22))
    layout = layout_of(diagonal(1, "refresh").plan(2, 3), 2, 2, 1)
    image = [0, 1, 2, 2, 3, 4, 5]
    assert layout.position[7:].tolist() == [6, 7, *(8 + place for place in image)]
    assert layout.fed.tolist() == [True, True, False, True, True, True, True] + [True] * 9


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="window must be at least 1, got 0"):
        diagonal(0)
    with pytest.raises(InputError, match="row_end must be 'prompt' or 'refresh', got 'x'"):
        diagonal(1, "x")
    assert str(sequential()) == "sequential()"
    assert str(diagonal(3)) == "diagonal(3, row_end='prompt')"
