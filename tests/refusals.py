"""Commands that must be refused, and the ways to spoil what they are given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flap_stream.cli import main
from flap_stream.model.model_files import INDEX_NAME


def contents(place: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


def refuse(
    capsys: pytest.CaptureFixture[str], command: str, *words: str, code: int = 2, touches: tuple[str, ...] = ()
) -> str:
    """Run a command that must be refused in one sentence with these words, leaving everything as it was."""
    capsys.readouterr()
    before = contents(Path())
    assert main([*command.split(), "--quiet"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flap-stream: ") and captured.err.count("\n") == 1, captured.err
    for word in words:
        assert word in captured.err
    after = contents(Path())
    changed = {name for name in before.keys() | after.keys() if before.get(name, b"?") != after.get(name, b"?")}
    assert {name for name in changed if not name.startswith(touches or ("?",))} == set()
    return captured.err


PRUNE = "prune model out --calibration tokens.npy"


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header of the first shard and leave the data alone."""

    def edit(model: Path) -> None:
        path = sorted(model.glob("*.safetensors"))[0]
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        raw = change(header)
        raw = raw if isinstance(raw, bytes) else json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])

    return edit


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Change (or, with None, drop) one tensor in its real shard and in the index."""

    def edit(model: Path) -> None:
        index = json.loads((model / INDEX_NAME).read_text())
        shard = model / index["weight_map"][name]
        tensors = load_file(shard)
        tensor = change(tensors.pop(name))
        if tensor is None:
            del index["weight_map"][name]
            (model / INDEX_NAME).write_text(json.dumps(index))
        else:
            tensors[name] = tensor.contiguous()
        save_file(tensors, shard, metadata={"format": "pt"})

    return edit


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change


def drop_shards(model: Path) -> None:
    for file in (*model.glob("*.safetensors"), model / INDEX_NAME):
        file.unlink()


def leave_a_pickle(model: Path) -> None:
    drop_shards(model)
    torch.save({}, model / "pytorch_model.bin")


def cut_shard(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def edit_index(**weights: str) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        index = json.loads((model / INDEX_NAME).read_text())
        index["weight_map"] |= weights
        (model / INDEX_NAME).write_text(json.dumps(index))

    return edit


def write_npy(name: str, array: np.ndarray) -> str:
    np.save(name, array, allow_pickle=array.dtype == object)
    return name
