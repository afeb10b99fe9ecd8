"""Tensors in files of others: looked at before they are read, read one at a time, never unpickled.

A checkpoint of 1.2 billion parameters is 5 GB in float32. Files are mapped into memory, so what is
held is what the reader makes of them.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlir.checkpoints import WEIGHTS, read_json, write_parts
from rlir.errors import InputError

INDEX = WEIGHTS + ".index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of weights that are read and written, by their names in safetensors files."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: what is known of it unread, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """May share the file's memory: not to be written to."""


def read_safetensors(directory: Path) -> dict[str, Stored]:
    """The tensors of a folder's model.safetensors, or of the shards that its index names."""
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return _read_file(directory / WEIGHTS)
    path = directory / INDEX
    index = read_json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise InputError(f"llama: {path} must hold a weight_map of names to files, found none")
    found: dict[str, Stored] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise InputError(f"llama: {path} must name files beside it, got {shard!r}")
        held = _read_file(directory / shard)
        for name in (name for name, file in shards.items() if file == shard):
            if name not in held:
                raise InputError(f"llama: {directory / shard} must hold {name}, found none")
            found[name] = held[name]
    return found


def _read_file(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        names = file.keys()
        return {name: _stored(path, file, name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f"llama: {path} must be readable, got {_first_line(error)}") from None


def _stored(path: Path, file: Any, name: str) -> Stored:
    part = file.get_slice(name)
    kind = part.get_dtype()
    if kind not in DTYPES:
        raise InputError(f"llama: {path}: {name} must be of {' or '.join(DTYPES)}, got {kind}")

    def read() -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor

    return Stored(tuple(part.get_shape()), DTYPES[kind], read)


def read_state_dict(path: Path, prefix: str) -> dict[str, Stored]:
    """The tensors of a torch zip file's ``state_dict`` whose names begin so, named without it."""
    state = _load(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"llama: {path} must hold a state_dict, found none")
    found = {}
    for name, value in state.items():
        if not isinstance(name, str) or not name.startswith(prefix):
            continue
        if not isinstance(value, Tensor) or value.dtype not in DTYPES.values():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"llama: {path}: {name} must be float32, bfloat16 or float16, got {kind}"
            )
        # A tensor that repeats a few bytes, or has none, can claim any size.
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or not value.is_contiguous():
            raise InputError(f"llama: {path}: {name} must be a contiguous tensor, got another kind")
        found[name.removeprefix(prefix)] = Stored(
            tuple(value.shape), value.dtype, partial(torch.Tensor.detach, value)
        )
    return found


def _load(path: Path) -> Any:
    """Tensors and plain values alone; the file is mapped, not read."""
    if not path.is_file():
        raise InputError(f"llama: {path} must be a file, found none")
    if not zipfile.is_zipfile(path):
        raise InputError(f"llama: {path} must be a torch zip file, got another format")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = code[1] if code else _first_line(error)
        raise InputError(
            f"llama: {path} must hold tensors and plain values alone, found {found}"
        ) from None
    except Exception as error:  # whatever a broken file makes torch say
        raise InputError(f"llama: {path} must be readable, got {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def write_safetensors(
    path: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    make: Callable[[str], Tensor],
) -> None:
    """Write the tensors that ``make`` makes, one at a time: a model need not be in memory twice.

    ``tensors``: the shape and dtype of each. The file is the old one or the whole new one.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name, (shape, dtype) in tensors.items():
            tensor = make(name).detach().to("cpu", dtype)
            assert tuple(tensor.shape) == shape, name
            yield tensor.contiguous().flatten().view(torch.uint8).numpy().data

    write_parts(path, parts())
