"""In what order the tokens of a generated image are drawn.

``sequential()`` is raster order. ``diagonal(window)`` (arXiv 2503.14070) begins row r + 1 once row
r has ``window`` tokens, and every row under way advances by one token a step. A row's first token
follows the last one of the row above, which is not drawn yet: a stand-in is fed in its place.

Legend: S visual tokens (R rows, C columns), A action tokens. A *place* is a token's raster index in
its image, a *slot* where its key and value stand in an image's part of the cache. They are the same
but where true tokens are fed beside their stand-ins (``row_end="refresh"``).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rlir.errors import InputError
from rlir.ops import Mask
from rlir.ops import diagonal as diagonal_mask

RowEnd = Literal["prompt", "refresh"]


@dataclass(frozen=True)
class Feed:
    """A token that goes through the model."""

    step: int
    """Of its image: step 0 feeds the action block (and what was left of the frame before)."""
    slot: int
    """Where its key and value go."""
    place: int
    """Its rotary position and slot embedding are this raster index's."""
    stands_in: bool
    """It is the prompt's first frame's token at ``place``, not the drawn one."""
    predicts: int
    """The place that is drawn from what comes out, or -1."""


@dataclass(frozen=True)
class Plan:
    """A schedule for one grid. The image's last token is not in ``feeds``: it goes with the next
    frame's action block.
    """

    rows: int
    columns: int
    window: int
    refresh: bool
    feeds: tuple[Feed, ...]

    @property
    def slots(self) -> int:
        """Slots an image takes in the cache: S, and R - 1 more with ``refresh``."""
        return self.rows * self.columns + (self.rows - 1 if self.refresh else 0)

    @property
    def steps(self) -> int:
        """Steps of an image, the action block's included."""
        return 1 + max((feed.step for feed in self.feeds), default=0)

    @property
    def raster(self) -> bool:
        """Whether tokens are drawn one after the other."""
        return self.window == self.columns

    def slot_of(self, place: int) -> int:
        """Where an image's true token at ``place`` stands, of a frame that was given."""
        if not self.refresh:
            return place
        row, column = divmod(place, self.columns)
        last = column + 1 == self.columns and row + 1 < self.rows  # its stand-in comes before it
        return row * (self.columns + 1) + column + last

    @property
    def _s(self) -> int:
        return self.rows * self.columns

    def step_of(self) -> tuple[int, ...]:
        """The step at which each place is drawn, [S]."""
        steps = [0] * self._s
        for feed in self.feeds:
            if feed.predicts >= 0:
                steps[feed.predicts] = feed.step
        return tuple(steps)

    def mask(self, action_tokens: int, context: int, window_frames: int | None) -> Mask:
        """What a token saw when it was fed: of streams whose first ``context`` frames were given.

        ``window_frames``: how many frames are seen, or None for all.
        """
        more = (True,) if self.refresh else ()
        return diagonal_mask(
            self.rows, self.columns, self.window, action_tokens, window_frames, context, *more
        )


@dataclass(frozen=True)
class Schedule:
    """Made by ``sequential`` and ``diagonal``."""

    window: int | None = None
    """Tokens of a row before the next one begins; None is raster order."""
    row_end: RowEnd = "prompt"

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InputError(f"schedule: window must be at least 1, got {self.window}")
        if self.row_end not in ("prompt", "refresh"):
            raise InputError(
                f"schedule: row_end must be 'prompt' or 'refresh', got {self.row_end!r}"
            )

    def plan(self, rows: int, columns: int) -> Plan:
        """The schedule for images of that grid. A window of a row or more is raster order."""
        window = columns if self.window is None else min(self.window, columns)
        return _plan(rows, columns, window, self.row_end == "refresh" and window < columns)

    def __str__(self) -> str:
        if self.window is None:
            return "sequential()"
        return f"diagonal({self.window}, row_end={self.row_end!r})"


def sequential() -> Schedule:
    """Raster order, one token a step."""
    return Schedule()


def diagonal(window: int, row_end: RowEnd = "prompt") -> Schedule:
    """Row r + 1 begins once row r has ``window`` tokens; each row under way takes one a step.

    Args:
        window: from 1; the columns of an image or more is raster order.
        row_end: what stands for a row's last token when the next row begins. "prompt": the
            prompt's first frame's token at that place, as public MineWorld does; the true one is
            never fed. "refresh": the true one is fed too, as soon as it is drawn, and from then on
            is seen in place of the stand-in.
    """
    return Schedule(window, row_end)


@lru_cache(maxsize=64)
def _plan(rows: int, columns: int, window: int, refresh: bool) -> Plan:
    feeds = []
    extra = 1 if refresh else 0
    for r in range(rows):
        first = r * (columns + extra)
        for c in range(columns - 1):
            place = r * columns + c
            feeds.append(Feed(r * window + c + 1, first + c, place, False, place + 1))
        if r + 1 == rows:
            continue
        end = (r + 1) * columns - 1
        waits = window < columns  # the row's last token is not drawn when the next row begins
        feeds.append(Feed((r + 1) * window, first + columns - 1, end, waits, end + 1))
        if refresh:
            feeds.append(Feed(r * window + columns, first + columns, end, False, -1))
    feeds.sort(key=lambda feed: (feed.step, feed.slot))
    return Plan(rows, columns, window, refresh, tuple(feeds))
