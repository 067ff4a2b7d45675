import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from faults import flip
from models import random_tokens

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.scoring import ChannelStatistics, LayerStatistics
from flap_stream.config import PlanConfig
from flap_stream.errors import CorruptRun, RunLocked, RunMismatch
from flap_stream.storage import files, run_manifest
from flap_stream.storage.collected import LayerCost
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_manifest import tokens_digest

SHAPE = LayerShape(kv_groups=4, heads_per_group=1, head_dim=2, neurons=7, group_cost=32, neuron_cost=12)
LAYERS = [{**asdict(SHAPE), "experts": []}] * 2
MANIFEST: dict[str, Any] = {
    "model": {"config": "abc", "shard_bytes": {"model.safetensors": 10}},
    "tokens": {"sha256": tokens_digest(random_tokens(3, 5)), "shape": [3, 5]},
    "options": {"method": "flap", "dtype": "torch.float32", "batch_size": 4},
    **{"source": "model", "calibration": {}, "threads": 1, "parameters": 900, "layers": LAYERS},
    "sizes": {"hidden": 8, "vocabulary": 97, "weight_bytes": 40, "expert_share": 1.0},
}


# --- the run directory ---


def _statistics(seed: int, groups: int = 2, neurons: int = 7) -> LayerStatistics:
    draw = np.random.default_rng(seed)

    def channel(size: int) -> ChannelStatistics:
        counts: dict[str, Any] = {"count": np.full(size, 15 + seed), "samples": 3}
        names = [field.name for field in fields(ChannelStatistics) if field.name not in counts]
        return ChannelStatistics(**counts | {name: draw.standard_normal(size) for name in names})

    return LayerStatistics(attention=channel(4 * groups), mlp=channel(neurons))


def _assert_bit_equal(one: LayerStatistics, other: LayerStatistics) -> None:
    for kind in Sublayer:
        for field in fields(ChannelStatistics):
            a, b = (getattr(layer.of(kind), field.name) for layer in (one, other))
            if isinstance(a, np.ndarray):
                assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
            else:
                assert a == b


PLAN = PlanConfig(ratio=0.3, structure="al-mm", remove_heads=2)
KEEPS = [
    LayerKeep(np.array([0, 2]), np.array([1, 3, 4])),
    LayerKeep(np.array([], dtype=np.int64), np.array([0])),
]


def _filled(path: Path) -> Path:
    """A run directory with tokens, two layers and a plan."""
    with RunDirectory.create(path, MANIFEST) as run:
        run.tokens.write(random_tokens(3, 5))
        for layer in range(2):
            run.statistics.write(layer, _statistics(layer), "")
        run.plan.write(PLAN, KEEPS)
    return path


def test_what_layers_took_comes_back_where_it_was_recorded(tmp_path: Path) -> None:
    cost = LayerCost(seconds=1.5, tokens=15, peak_host_bytes=7, peak_device_bytes=0)
    with RunDirectory.create(tmp_path / "run", MANIFEST) as run:
        run.statistics.write(0, _statistics(0), "")
        run.statistics.write(1, _statistics(1), "", cost)
    with RunDirectory(tmp_path / "run") as run:
        assert run.statistics.costs() == [None, cost]


def test_everything_comes_back_bit_equal(tmp_path: Path) -> None:
    with RunDirectory(_filled(tmp_path / "run")) as run:
        assert run.statistics.complete_layers() == 2
        for layer in range(2):
            _assert_bit_equal(run.statistics.read(layer), _statistics(layer))
        tokens = run.tokens.read()
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, random_tokens(3, 5))
        options, keeps = run.plan.read()
        assert options == PLAN
        for read, written in zip(keeps, KEEPS, strict=True):
            np.testing.assert_array_equal(read.kv_groups, written.kv_groups)
            np.testing.assert_array_equal(read.neurons, written.neurons)
            assert read.kv_groups.dtype == read.neurons.dtype == np.int64


def test_extreme_values_and_channels_without_weights_come_back_bit_equal(tmp_path: Path) -> None:
    odd = np.array([np.nan, np.inf, -0.0, 5e-324, -1.7976931348623157e308])
    arrays = [field.name for field in fields(ChannelStatistics) if field.name not in ("count", "samples")]
    written = LayerStatistics(
        attention=ChannelStatistics(
            count=np.zeros(0, dtype=np.int64), samples=0, **{name: np.zeros(0) for name in arrays}
        ),
        mlp=ChannelStatistics(count=np.full(5, 2**53 + 1), samples=1, **{name: odd for name in arrays}),
    )
    shapes = [{**asdict(SHAPE), "experts": [], "kv_groups": 0, "neurons": 5}]
    with RunDirectory.create(tmp_path / "run", {**MANIFEST, "layers": shapes}) as run:
        run.statistics.write(0, written, "")
        _assert_bit_equal(run.statistics.read(0), written)


def test_an_array_is_one_uncompressed_chunk_with_a_checksum(tmp_path: Path) -> None:
    group = _filled(tmp_path / "run") / "statistics.zarr" / "layers" / "0000"
    mean = json.loads((group / "mlp" / "mean" / "zarr.json").read_bytes())
    assert [codec["name"] for codec in mean["codecs"]] == ["bytes", "crc32c"]
    assert mean["fill_value"] == "NaN"
    assert (group / "mlp" / "mean" / "c" / "0").stat().st_size == 7 * 8 + 4
    opened = zarr.open_group(tmp_path / "run" / "statistics.zarr", mode="r")  # by anyone's zarr, from the top
    np.testing.assert_array_equal(opened["layers/0000/mlp/mean"], _statistics(0).mlp.mean)


@pytest.mark.parametrize("harm", [flip, Path.unlink, Path.touch], ids=["flipped", "missing", "added"])
@pytest.mark.parametrize("file", ["mlp/mean/c/0", "attention/m2/zarr.json", "zarr.json"])
def test_altered_statistics_are_noticed(tmp_path: Path, harm: Callable[[Path], None], file: str) -> None:
    path = _filled(tmp_path / "run")
    harmed = path / "statistics.zarr" / "layers" / "0001" / file
    harm(harmed.with_name("stranger") if harm is Path.touch else harmed)
    with RunDirectory(path) as run:
        run.statistics.read(0)
        with pytest.raises(CorruptRun, match=r"layers/0001 is altered"):
            run.statistics.read(1)


def test_statistics_that_are_gone_or_not_there_yet_are_told_apart(tmp_path: Path) -> None:
    path = _filled(tmp_path / "run")
    files.remove(path / "statistics.zarr" / "layers" / "0000")
    with RunDirectory(path) as run:
        with pytest.raises(CorruptRun, match=r"layers/0000 is missing"):
            run.statistics.read(0)
        with pytest.raises(CorruptRun, match=r"layers/0002 is not complete"):
            run.statistics.read(2)


def test_altered_tokens_are_noticed(tmp_path: Path) -> None:
    path = _filled(tmp_path / "run")
    flip(path / "tokens.zarr" / "tokens" / "c" / "0" / "0")
    with RunDirectory(path) as run, pytest.raises(CorruptRun, match=r"tokens\.zarr is altered"):
        run.tokens.read()


@pytest.mark.parametrize(("harm", "state"), [(flip, "altered"), (Path.unlink, "missing")])
def test_an_altered_plan_is_noticed_and_can_be_made_again(
    tmp_path: Path, harm: Callable[[Path], None], state: str
) -> None:
    path = _filled(tmp_path / "run")
    harm(path / "plan.json")
    with RunDirectory(path) as run:
        with pytest.raises(CorruptRun, match=rf"plan\.json is {state} .* flap-stream plan"):
            run.plan.read()
        run.plan.write(PLAN, KEEPS)
        assert run.plan.read()[0] == PLAN


def test_a_run_without_a_plan_says_how_to_make_one(tmp_path: Path) -> None:
    with (
        RunDirectory.create(tmp_path / "run", MANIFEST) as run,
        pytest.raises(RunMismatch, match="flap-stream plan"),
    ):
        run.plan.read()


def test_what_the_journal_does_not_name_is_written_anew(tmp_path: Path) -> None:
    path = _filled(tmp_path / "run")
    whole = (path / "journal").read_bytes().splitlines(keepends=True)
    (path / "journal").write_bytes(b"".join(whole[:3]))  # tokens, the group of layers and layer 0
    (path / "statistics.zarr" / "layers" / "0001.partial").mkdir()
    with RunDirectory(path) as run:
        assert run.statistics.complete_layers() == 1
        run.statistics.write(1, _statistics(5), "")
        assert run.statistics.complete_layers() == 2
        _assert_bit_equal(run.statistics.read(1), _statistics(5))
    assert sorted(p.name for p in (path / "statistics.zarr" / "layers").iterdir()) == ["0000", "0001", "zarr.json"]


@pytest.mark.parametrize("change", [{"version": run_manifest.VERSION + 1}, {"format": "something else"}])
def test_another_version_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = _filled(tmp_path / "run")
    manifest = json.loads((path / "run.json").read_bytes())
    (path / "run.json").write_text(json.dumps(manifest | change))
    with pytest.raises(RunMismatch, match=f"this version writes {run_manifest.FORMAT} {run_manifest.VERSION}"):
        RunDirectory(path)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, body: bytes) -> None:
    path = _filled(tmp_path / "run")
    (path / "run.json").write_bytes(body)
    with pytest.raises(CorruptRun, match=r"run\.json is damaged"):
        RunDirectory(path)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunMismatch, match="not a run directory"):
        RunDirectory(tmp_path / "mine")
    with pytest.raises(RunMismatch, match="is not a run directory"):
        RunDirectory.create(tmp_path / "mine", MANIFEST)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("model", "config", "other", "from the model model before it was changed: its config.json differed"),
        (
            "tokens",
            "shape",
            [3, 6],
            "produced different tokens then (3 windows of 5 tokens, now 3 windows of 6 tokens",
        ),
        ("options", "batch_size", 8, "with other options: --batch-size was 4, now 8"),
        ("options", "new", 1, "with other options: --new was not given, now 1"),
    ],
)
def test_create_names_what_differs(tmp_path: Path, part: str, key: str, value: Any, words: str) -> None:
    path = _filled(tmp_path / "run")
    other = MANIFEST | {part: MANIFEST[part] | {key: value}}
    with pytest.raises(RunMismatch) as caught:
        RunDirectory.create(path, other)
    assert words in str(caught.value)
    RunDirectory(path).close()  # the refused call has let go of the lock


def test_create_takes_up_what_was_made_for_the_same(tmp_path: Path) -> None:
    with RunDirectory.create(_filled(tmp_path / "run"), MANIFEST) as run:
        assert run.statistics.complete_layers() == 2


def test_a_removed_run_directory_leaves_nothing(tmp_path: Path) -> None:
    with RunDirectory(_filled(tmp_path / "run")) as run:
        run.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_run_directory_stays_and_can_be_used_again(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    for _ in range(2):
        with RunDirectory(_filled(tmp_path / "run")) as run:
            run.remove()
        assert (tmp_path / "run").readlink() == Path("disk")
        assert list((tmp_path / "disk").iterdir()) == []
    (tmp_path / "disk" / "lock").touch()  # what a kill during the removal leaves
    RunDirectory.remove_leftover(tmp_path / "run")
    assert (tmp_path / "run").is_symlink() and list((tmp_path / "disk").iterdir()) == []


def test_a_disk_that_is_mounted_as_the_run_directory_stays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no permission to mount a small file system")
    try:
        with RunDirectory(_filled(path)) as run:
            run.remove()
        assert path.is_mount() and list(path.iterdir()) == []
    finally:
        subprocess.run(["umount", path], check=True)


# --- the lock ---

HOLDER = """
import sys
from pathlib import Path
from flap_stream.storage.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    path = _filled(tmp_path / "run")
    with _holder(path) as process:
        for attempt in (RunDirectory, lambda p: RunDirectory.create(p, MANIFEST)):
            with pytest.raises(RunLocked, match=rf"in use by pid {process.pid} on {os.uname().nodename}"):
                attempt(path)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        with RunDirectory(path) as run:
            assert run.statistics.complete_layers() == 2
            assert (path / "lock").read_text().startswith(f"pid {os.getpid()} ")


@pytest.mark.parametrize("whose", ["first", "own"])
def test_a_lock_left_by_the_dead_is_taken_whoever_has_its_pid_now(tmp_path: Path, whose: str) -> None:
    path, pid = _filled(tmp_path / "run"), 1 if whose == "first" else os.getpid()
    (path / "lock").write_text(f"pid {pid} on {os.uname().nodename}")  # of before a reboot, or of another container
    with RunDirectory(path) as run:
        assert run.statistics.complete_layers() == 2


def test_what_a_writer_holds_may_be_looked_at(tmp_path: Path) -> None:
    path = _filled(tmp_path / "run")
    with _holder(path) as process, RunDirectory(path, is_writer=False) as run:
        assert run.statistics.complete_layers() == 2
        process.kill()


def test_of_two_that_start_at_once_one_alone_decides_what_the_run_is_for(tmp_path: Path) -> None:
    path = _filled(tmp_path / "run")
    with _holder(path) as process:
        (path / "run.json").unlink()  # the moment in which the first holds the lock and has not written run.json
        for name in ("journal", "plan.json", "tokens.zarr", "statistics.zarr"):
            files.remove(path / name)
        with pytest.raises(RunLocked):
            RunDirectory.create(path, MANIFEST)
        assert not (path / "run.json").exists()
        process.kill()
