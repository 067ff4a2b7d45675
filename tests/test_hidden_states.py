"""Hidden states give back what was put, wherever they live, and their snapshots are checked."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flap_stream.engine.hidden_states import Feed, HiddenStates, make_hidden_states
from flap_stream.errors import CorruptRun, InsufficientSpace

SHAPE = (7, 3, 4)
CPU = torch.device("cpu")


def values_of(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def contents(hidden: HiddenStates, batch_size: int) -> torch.Tensor:
    return torch.cat([values.clone() for _, values in hidden.stream(batch_size)])


@pytest.fixture(params=["host", "disk"])
def hidden(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HiddenStates]:
    with make_hidden_states(request.param, SHAPE, torch.bfloat16, CPU, tmp_path) as made:
        for start in range(0, 7, 3):
            made.put(start, values_of(1)[start : start + 3])
        made.advance()
        yield made


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 9])
def test_layer_after_layer_outputs_become_inputs(hidden: HiddenStates, batch_size: int) -> None:
    expected = values_of(1)
    for _layer in range(5):
        for start, values in hidden.stream(batch_size):
            assert torch.equal(values, expected[start : start + batch_size])
            hidden.put(start, values * 2 + 1)
        hidden.advance()
        expected = expected * 2 + 1
    assert torch.equal(contents(hidden, batch_size), expected)


def test_inputs_stay_while_nothing_is_put(hidden: HiddenStates) -> None:
    assert torch.equal(contents(hidden, 2), values_of(1))
    assert torch.equal(contents(hidden, 3), values_of(1))


def test_no_windows_are_none_and_not_all(hidden: HiddenStates) -> None:
    assert list(hidden.stored(2, range(2, 2))) == []


def test_a_feed_goes_on_after_a_batch_found_no_memory(hidden: HiddenStates, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, moved = Feed(hidden, 3), torch.Tensor.to
    assert torch.equal(feed.take(0, 3), values_of(1)[:3])

    def fail(values: torch.Tensor, *where: object, **how: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "to", fail)
        feed.take(3, 3)
    assert torch.Tensor.to is moved
    assert torch.equal(feed.take(3, 2), values_of(1)[3:5]) and torch.equal(feed.take(5, 1), values_of(1)[5:6])


def test_a_snapshot_comes_back_bit_equal_in_every_place(hidden: HiddenStates, tmp_path: Path) -> None:
    digest = hidden.save(tmp_path / "snapshot")
    assert (tmp_path / "snapshot").read_bytes() == values_of(1).view(torch.uint8).numpy().tobytes()
    for place in ("host", "disk"):
        with make_hidden_states(place, SHAPE, torch.bfloat16, CPU, tmp_path) as read:
            read.load(tmp_path / "snapshot", digest)
            assert torch.equal(contents(read, 2), values_of(1))


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        Path.unlink,
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes() + b"0"),
    ],
)
def test_an_altered_snapshot_is_refused(hidden: HiddenStates, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    digest = hidden.save(tmp_path / "snapshot")
    harm(tmp_path / "snapshot")
    with pytest.raises(CorruptRun, match="snapshot is missing or altered"):
        hidden.load(tmp_path / "snapshot", digest)


def test_files_on_disk_have_no_name_to_be_left_behind(tmp_path: Path) -> None:
    with make_hidden_states("disk", SHAPE, torch.bfloat16, CPU, tmp_path) as hidden:
        hidden.put(0, values_of(1))
        hidden.advance()
        assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_refused_and_not_filled_to_find_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 takes all the room there is before it says that it is too little; others who write meanwhile would fail."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("room was taken"))
    windows = 2 * os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize // (1024 * 1024)
    with pytest.raises(InsufficientSpace, match="hidden states on disk need"):
        make_hidden_states("disk", (windows, 1024, 1024), torch.uint8, CPU, tmp_path)
