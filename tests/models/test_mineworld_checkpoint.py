"""MineWorld's own checkpoints: the same model as a Hugging Face folder's, and nothing is run."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from testkit import DAMAGES, damage, one_line, same
from torch import Tensor

pytest.importorskip("transformers")

from llamas import FRAMES, GRID, llama, load, saved, weights

from rlir.checkpoints import CONFIG, read_json
from rlir.errors import InputError
from rlir.models.llama import load_mineworld, save_llama
from rlir.models.load import load_world_model
from rlir.models.world_model import WorldModel

SIZES = {"frames": FRAMES, "head_dim": 8, "norm_eps": 1e-4}
"""What the file does not say."""
NAME = "transformer.model.layers.1.self_attn.v_proj.weight"


def state(dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    held = {f"transformer.{k}": v for k, v in llama().to(dtype).state_dict().items()}
    # What else a training module holds is not the transformer's.
    return {**held, "tokenizer.model.quantize.embedding.weight": torch.ones(3, 3)}


def written(path: Path, held: Any) -> Path:
    torch.save(held, path)
    return path


def load_it(path: Path, **changes: Any) -> WorldModel:
    return load_mineworld(path, **{**GRID, **SIZES, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bare", [False, True])
def test_it_is_the_model_of_the_same_folder(tmp_path: Path, dtype: torch.dtype, bare: bool) -> None:
    extra = {"epoch": 3, "global_step": 7, "hyper_parameters": {"lr": 1e-4}}
    held = state(dtype)
    path = written(tmp_path / "m.ckpt", held if bare else {"state_dict": held, **extra})
    folder = saved(tmp_path / "llama", llama().to(dtype))
    ours, theirs = load_it(path), load(folder)
    assert ours.config == theirs.config
    assert same(ours.state_dict(), theirs.state_dict())
    assert not ours.training
    assert not any(x.requires_grad for x in ours.parameters())
    save_llama(ours, tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(folder))
    assert read_json(tmp_path / "out" / CONFIG)["torch_dtype"] == str(dtype).partition(".")[2]
    assert same(load_world_model(tmp_path / "out").state_dict(), ours.state_dict())


def test_the_file_is_not_written_to(tmp_path: Path) -> None:
    """Its memory is the file's."""
    path = written(tmp_path / "m.ckpt", state(torch.float32))
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in load_it(path).parameters():
            parameter.add_(1)
    assert path.read_bytes() == before


class Hostile:
    def __reduce__(self) -> tuple:
        return (print, ("code of a checkpoint was run",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_holds_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool
) -> None:
    held = {"state_dict": state(), "callbacks": Hostile()}
    torch.save(held, path := tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    text = "alone, found .*print" if zipped else "must be a torch zip file"
    with pytest.raises(InputError, match=text) as caught:
        load_it(path)
    assert str(path) in one_line(str(caught.value))
    path.write_bytes(pickle.dumps(held))
    with pytest.raises(InputError, match="must be a torch zip file, got another format"):
        load_it(path)
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.clear(), "must hold a matrix transformer.model.embed_tokens.weight, found no"),
        (lambda s: s.pop(NAME), "must hold model.layers.1.self_attn.v_proj.weight, found none"),
        (lambda s: s.update({NAME: s[NAME].T.contiguous()}), r"shape \(16, 32\), got \(32, 16\)"),
        (lambda s: s.update({NAME: torch.zeros(16, 1).half().expand(16, 32)}), "a contiguous tens"),
        (lambda s: s.update({NAME: s[NAME].to_sparse()}), "must be a contiguous tensor, got anoth"),
        (
            lambda s: s.update({NAME: s[NAME].to("meta")}),
            "must be a contiguous tensor, got ",
        ),
        (lambda s: s.update({NAME: s[NAME].double()}), "float16, got torch.float64"),
        (lambda s: s.update({NAME: [1.0]}), "float16, got list"),
        (lambda s: s.update({"transformer.x": torch.ones(1)}), "must hold no other tensors, got x"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    held = state()
    change(held)
    path = written(tmp_path / "m.ckpt", {"state_dict": held})
    with pytest.raises(InputError, match=text) as caught:
        load_it(path)
    assert one_line(str(caught.value)).startswith(f"llama: {path}")


@pytest.mark.parametrize(
    ("held", "text"),
    [
        (torch.ones(3), "must hold a state_dict, found none"),
        ([1, 2], "must hold a state_dict, found none"),
        ({"state_dict": 3}, "must hold a state_dict, found none"),
        ({"state_dict": {3: torch.ones(2)}}, "must hold a matrix transformer.model.embed_tokens"),
    ],
)
def test_a_file_without_a_state_dict_is_named(tmp_path: Path, held: Any, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        load_it(written(tmp_path / "m.ckpt", held))
    one_line(str(caught.value))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "m.ckpt", {"state_dict": state()})
    damage(path, kind)
    with pytest.raises(InputError) as caught:
        load_it(path)
    assert str(path) in one_line(str(caught.value))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"head_dim": 64}, "heads of head_dim 64, got a hidden size of 32 and 16 rows of keys"),
        ({"head_dim": 32}, "heads of head_dim 32, got"),
        ({"head_dim": 0}, "heads of head_dim 0, got"),
        ({"codes": 8192}, "a vocabulary of at least 8260, 8192 codes and the tokens of mineworld"),
        ({"frames": 1}, "frames must be >= 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text) as caught:
        load_it(written(tmp_path / "m.ckpt", state()), **changes)
    one_line(str(caught.value))
