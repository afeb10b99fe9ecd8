"""What an evaluation draws depends on the clip and the seeds alone."""

import torch
from torch import Tensor

from rlir.actions.space import DOOM
from rlir.evaluation.evaluator import EvaluationConfig, Evaluator
from rlir.models.world_model import WorldModel


def evaluator(count: int) -> Evaluator:
    """An evaluator of random clips, without the models that read them."""
    generator = torch.Generator().manual_seed(0)
    made = Evaluator.__new__(Evaluator)
    made.config = EvaluationConfig(seed=5)
    made.codes = torch.randint(16, (count, 5, 8), generator=generator)
    columns = [torch.randint(n, (count, 4), generator=generator) for n in DOOM.factor_sizes]
    made.actions = torch.stack(columns, -1)
    return made


def test_a_clip_does_not_depend_on_the_batch(world_model: WorldModel) -> None:
    test = evaluator(11)
    whole = test.continuations(world_model)
    assert torch.equal(whole[:, 0], test.codes[:, 0])

    def drawn(**options: int) -> Tensor:
        return test.continuations(world_model, **options)

    assert torch.equal(drawn(batch=4), whole)
    assert torch.equal(drawn(batch=1, count=3), whole[:3])
    assert not torch.equal(drawn(seed=1), whole)
