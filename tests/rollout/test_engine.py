"""A rollout's bits depend on its prompt, actions, seed and row id alone, and are the right ones."""

import itertools

import pytest
import torch
from backends import instruction_set, instruction_sets, needs_amx
from cases import poisoned_caches
from testkit import WORLD_MODEL, stirred
from torch import Tensor

from rlir import _library
from rlir.actions.space import DOOM
from rlir.errors import InputError
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.rollout.engine import RolloutEngine, rollout_seed
from rlir.rollout.parity import token_logprob
from rlir.rollout.sampling import Sampling
from rlir.rollout.stepwise import StepwiseEngine
from rlir.rollout.trajectories import Trajectories, prompts_of

pytestmark = pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")

SHAPES = {
    "tiny": {},
    "odd": {"rows": 2, "columns": 3, "hidden": 96, "heads": 3, "kv_heads": 1, "mlp": 37},
    "one token": {"rows": 1, "columns": 1, "hidden": 16, "heads": 8, "kv_heads": 8, "mlp": 1},
    "wide": {"codes": 300, "hidden": 64, "heads": 2, "kv_heads": 1, "rows": 5, "columns": 7},
    "no blocks": {"stem_blocks": 0, "stem_channels": 5, "layers": 1},
}
DTYPES = [torch.bfloat16, torch.float32]


def make(shape: str = "tiny", seed: int = 0) -> WorldModel:
    torch.manual_seed(seed)
    model = WorldModel(WorldModelConfig(**{**vars(WORLD_MODEL), **SHAPES[shape]}))
    return stirred(model, scale=0.15, seed=seed).eval().requires_grad_(False)


def inputs(model: WorldModel, count: int, length: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(model.config.codes, (count, model.config.tokens), generator=generator)
    columns = [
        torch.randint(size, (count, length - 1), generator=generator) for size in DOOM.factor_sizes
    ]
    return prompts, torch.stack(columns, -1)


def roll(
    engine: RolloutEngine | StepwiseEngine,
    prompts: Tensor,
    actions: Tensor,
    temperature: float = 1.0,
    **options,
) -> Trajectories:
    return engine.rollout(prompts_of(prompts, actions), sampling=Sampling(temperature), **options)


def same(a: Trajectories, b: Trajectories, rows: slice | Tensor = slice(None)) -> bool:
    """Whether rollouts ``rows`` of a are those of b, bit for bit."""
    return torch.equal(a.codes[rows], b.codes) and torch.equal(a.logprob[rows], b.logprob)


def exact(
    model: WorldModel, drawn: Trajectories, actions: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of the drawn codes by a teacher-forced forward in float64."""
    wide = WorldModel(model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.rotary = wide.rotary.double()
    with torch.no_grad():
        x = wide.hidden(drawn.codes, wide.action_ids(actions))
        logits = wide.lm_head(x) / (temperature or 1.0)
    return logits.log_softmax(-1).gather(-1, drawn.codes[:, 1:, :, None])[..., 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [1, 3])
def test_float32_is_a_teacher_forced_forward(shape: str, group_size: int) -> None:
    model = make(shape)
    prompts, actions = inputs(model, 3)
    options = {"group_size": group_size, "temperature": 0.8, "seed": 5}
    drawn = roll(RolloutEngine(model, torch.float32), prompts, actions, **options)
    truth = exact(model, drawn, actions.repeat_interleave(group_size, 0), 0.8)
    torch.testing.assert_close(drawn.logprob.double(), truth, atol=5e-5, rtol=1e-5)
    assert torch.equal(drawn.codes[:, 0], prompts.repeat_interleave(group_size, 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_at_most_twice_as_far_off_as_plain_pytorch(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the references of the ops, and torch's convolutions, in bfloat16."""
    model = make(shape)
    prompts, actions = inputs(model, 4)
    drawn = roll(RolloutEngine(model), prompts, actions, group_size=4, seed=1)
    truth = exact(model, drawn, actions.repeat_interleave(4, 0))
    monkeypatch.setattr(_library, "PATH", None)
    monkeypatch.setattr(_library, "FORCE_REFERENCE", True)
    plain = token_logprob(model, drawn.codes, drawn.actions, 1.0)
    error, bound = ((x - truth).abs().mean() for x in (drawn.logprob, plain))
    assert error < 2 * bound + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_most_likely_code(dtype: torch.dtype) -> None:
    model = make("wide")
    prompts, actions = inputs(model, 3, 2)
    engine = RolloutEngine(model, dtype)
    drawn = roll(engine, prompts, actions, group_size=2, temperature=0, seed=0)
    plain = roll(
        StepwiseEngine(model, dtype), prompts, actions, group_size=2, temperature=0, seed=0
    )
    assert same(drawn, plain)
    assert torch.equal(drawn.codes[::2], drawn.codes[1::2])
    assert not torch.equal(drawn.codes[:, 1], prompts.repeat_interleave(2, 0))
    truth = exact(model, drawn, actions.repeat_interleave(2, 0))
    atol = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(drawn.logprob.double(), truth, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["tiny", "odd"])
def test_batch_and_order_have_no_influence(shape: str, dtype: torch.dtype) -> None:
    model = make(shape)
    prompts, actions = inputs(model, 7)
    engine = RolloutEngine(model, dtype)
    whole = roll(engine, prompts, actions, group_size=5, seed=3)
    ids = torch.arange(35)
    for p, g in ((0, 5), (6, 2)):  # one prompt by itself, and part of its group
        rows = ids[5 * p : 5 * p + g]
        one = slice(p, p + 1)
        part = roll(engine, prompts[one], actions[one], group_size=g, seed=3, row_ids=rows)
        assert same(whole, part, rows)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    rows = ids.view(7, 5)[order].flatten()
    mixed = roll(engine, prompts[order], actions[order], group_size=5, seed=3, row_ids=rows)
    assert same(whole, mixed, rows)
    # A group, or as many prompts of one member.
    alone = roll(engine, prompts.repeat_interleave(5, 0), actions.repeat_interleave(5, 0), seed=3)
    assert same(whole, alone)


def test_threads_have_no_influence() -> None:
    model = make("odd")
    prompts, actions = inputs(model, 5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(roll(RolloutEngine(model), prompts, actions, group_size=9, seed=1))
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_instruction_sets_give_the_same_bits(shape: str, dtype: torch.dtype) -> None:
    model = make(shape)
    prompts, actions = inputs(model, 2)
    found = {}
    for isa in instruction_sets():
        if isa == "amx" and dtype == torch.bfloat16:
            continue  # bits of its own
        with instruction_set(isa):
            engine = RolloutEngine(model, dtype)
            found[isa] = roll(engine, prompts, actions, group_size=5, seed=2)
    first = found.pop(instruction_sets()[0])
    for isa, drawn in found.items():
        assert same(first, drawn), isa
        assert torch.equal(first.entropy, drawn.entropy)


@pytest.mark.parametrize(
    ("shape", "dtype", "isa"),
    [
        *itertools.product(SHAPES, DTYPES, instruction_sets()[-1:]),
        *(
            pytest.param(shape, torch.bfloat16, "amx", marks=needs_amx)
            for shape in ("one token", "wide")
        ),
    ],
)
def test_what_was_never_written_is_never_used(shape: str, dtype: torch.dtype, isa: str) -> None:
    model = make(shape)
    prompts, actions = inputs(model, 1 if isa == "amx" else 3)
    actions = actions[:, :3] if isa == "amx" else actions
    with instruction_set(isa):
        assert_poison_is_not_seen(RolloutEngine(model, dtype), prompts, actions)


def assert_poison_is_not_seen(engine: RolloutEngine, prompts: Tensor, actions: Tensor) -> None:
    plain = roll(engine, prompts, actions, group_size=3, seed=2)
    with poisoned_caches():
        again = roll(engine, prompts, actions, group_size=3, seed=2)
    assert same(plain, again)
    assert plain.logprob.isfinite().all()


def test_seed_and_row_decide() -> None:
    model = make()
    prompts, actions = inputs(model, 1)
    engine = RolloutEngine(model)
    many = roll(engine, prompts, actions, group_size=6, seed=rollout_seed(1, 2))
    assert len(many.codes.flatten(1).unique(dim=0)) == 6
    other = roll(engine, prompts, actions, group_size=6, seed=rollout_seed(2, 1))
    assert not torch.equal(many.codes, other.codes)
    ids = torch.tensor([2, 5, 2])
    rows = roll(engine, prompts, actions, group_size=3, seed=rollout_seed(1, 2), row_ids=ids)
    assert same(many, rows, ids)


def test_the_engine_keeps_the_weights_it_was_made_of() -> None:
    model = make()
    prompts, actions = inputs(model, 2)
    engine = RolloutEngine(model)
    before = roll(engine, prompts, actions, seed=0)
    for parameter in model.parameters():
        parameter.zero_()
    assert same(before, roll(engine, prompts, actions, seed=0))


def test_empty_batches_and_clips_of_the_prompt_alone() -> None:
    model = make()
    prompts, actions = inputs(model, 2)
    engine = RolloutEngine(model)
    none = roll(engine, prompts[:0], actions[:0], seed=0)
    assert none.codes.shape == (0, 1, model.config.tokens)
    alone = roll(engine, prompts, actions[:, :0], seed=0)
    assert torch.equal(alone.codes[:, 0], prompts)
    assert alone.logprob.shape == (2, 0, model.config.tokens)


def test_rollouts_can_be_trained_on() -> None:
    model = make().requires_grad_(True)
    prompts, actions = inputs(model, 2)
    drawn = roll(RolloutEngine(model), prompts, actions, seed=0)
    logits = model(drawn.codes, model.action_ids(actions))
    chosen = logits.log_softmax(-1).gather(-1, drawn.codes[:, 1:, :, None])[..., 0]
    ((chosen - drawn.logprob).exp() * drawn.logprob).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "rollout: group_size must be >= 1"),
        ({"temperature": float("inf")}, "temperature must be finite and >= 0, got inf"),
        ({"prompts": torch.zeros(2, 3, dtype=torch.int64)}, "prompts must have 8 tokens a frame"),
        ({"prompts": torch.full((2, 8), 16)}, "codes must be from 0 and below 16"),
        ({"prompts": torch.zeros(2, 8)}, "prompt's codes must be int64 of 2 dimensions"),
        ({"actions": torch.zeros(3, 4, 4, dtype=torch.int64)}, "must each have an action seq"),
        ({"actions": torch.full((2, 4, 4), 9)}, "classes of doom must be from 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"row_ids": torch.zeros(3, dtype=torch.int64)}, r"row_ids must be int64 \[2\]"),
    ],
)
def test_input_that_does_not_fit_is_refused_in_one_line(change: dict, message: str) -> None:
    model = make()
    prompts, actions = inputs(model, 2)
    arguments = {"prompts": prompts, "actions": actions, "seed": 0, **change}
    with pytest.raises(InputError, match=message) as caught:
        roll(RolloutEngine(model), **arguments)
    assert "\n" not in str(caught.value)


def test_other_formats_are_refused() -> None:
    with pytest.raises(InputError, match="dtype must be bfloat16 or float32, got"):
        RolloutEngine(make(), torch.float16)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "layers.1.down_proj.weight", "stem.embed.weight"]
)
def test_a_policy_that_is_no_number_is_one_line(name: str) -> None:
    model = make()
    model.get_parameter(name).fill_(torch.nan)
    prompts, actions = inputs(model, 2)
    with pytest.raises(InputError, match="rollout: logits must be finite, got otherwise in ro"):
        roll(RolloutEngine(model), prompts, actions, seed=0)


@pytest.mark.skipif(len(instruction_sets()) < 3, reason="one layout of panels here")
def test_weights_of_another_instruction_set_are_refused() -> None:
    model = make()
    engine = RolloutEngine(model)
    prompts, actions = inputs(model, 2)
    with (
        instruction_set("baseline"),
        pytest.raises(InputError, match="packed for the instruction set in use"),
    ):
        roll(engine, prompts, actions, seed=0)
