"""A run directory that someone else made or changed, digests and all: a sentence, and nothing is believed or run."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
from faults import Fault, make_job
from models import contents
from rank_jobs import RankJob, launch
from run_directories import collect_runs, copy_runs, refused

import flap_stream
from flap_stream.cli import main
from flap_stream.config import PlanConfig
from flap_stream.errors import CorruptRun, RunLocked
from flap_stream.storage import files, run_manifest


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect_runs(tmp_path_factory.mktemp("collected"))


@pytest.fixture
def place(collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_runs(collected, tmp_path)


def reseal(run: Path, kind: str, name: str, digest: str) -> None:
    """Write the journal as if this were what had been committed."""
    lines = []
    for line in (run / "journal").read_bytes().splitlines():
        entry = json.loads(line.partition(b" ")[2])
        if (entry["kind"], entry["name"]) == (kind, name):
            entry["digest"] = digest
        lines.append(journal_line(json.dumps(entry).encode()))
    (run / "journal").write_bytes(b"".join(lines))


def journal_line(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"


def change_plan(run: Path, change: Callable[[Any], Any]) -> None:
    plan = json.loads((run / "plan.json").read_bytes())
    body = json.dumps(change(plan) or plan).encode()
    (run / "plan.json").write_bytes(body)
    reseal(run, "plan", "plan", hashlib.sha256(body).hexdigest())


def change_manifest(run: Path, change: Callable[[Any], Any]) -> None:
    manifest = json.loads((run / "run.json").read_bytes())
    change(manifest)
    manifest["sha256"] = run_manifest.manifest_digest(manifest)
    (run / "run.json").write_text(json.dumps(manifest))


# --- the plan ---


def in_layer(kind: str, change: Callable[[list[int]], Any], layer: int = 1) -> Callable[[Any], Any]:
    def edit(plan: Any) -> None:
        units = plan["layers"][layer][kind]
        plan["layers"][layer][kind] = change(units) or units

    return edit


PLANS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "negative": (in_layer("kept_neurons", lambda u: [-1, *u]), "neurons of layer 1 are not all from 0 to 95"),
    "too large": (in_layer("kept_neurons", lambda u: [*u, 96]), "neurons of layer 1 are not all from 0 to 95"),
    "huge": (in_layer("kept_neurons", lambda u: [*u, 1 << 70]), "neurons of layer 1 are not all from 0 to 95"),
    "twice": (
        in_layer("kept_neurons", lambda u: [u[0], *u]),
        "neurons of layer 1 are not in strictly ascending order",
    ),
    "in no order": (
        in_layer("kept_kv_groups", lambda u: [1, 0]),
        "KV groups of layer 1 are not in strictly ascending order",
    ),
    "group too large": (in_layer("kept_kv_groups", lambda u: [0, 2]), "KV groups of layer 1 are not all from 0 to 1"),
    "a truth value": (in_layer("kept_neurons", lambda u: [True]), "neurons of layer 1 are not all"),
    "nested": (in_layer("kept_neurons", lambda u: [[0]]), "neurons of layer 1 are not all"),
    "a layer less": (lambda plan: plan["layers"].pop() and None, "it has 2 layers, the model has 3"),
    "no layers": (lambda plan: plan.pop("layers") and None, "it does not have the form of a plan"),
    "no object": (lambda plan: [1], "it does not have the form of a plan"),
    "deep": (lambda plan: plan.update(layers=json.loads("[" * 200 + "]" * 200)), "nested too deeply"),
    "another option": (lambda plan: plan["options"].update(colour=1), "colour"),
    "an option of another type": (lambda plan: plan["options"].update(ratio="0.3"), "its option ratio is 0.3"),
    "an option out of range": (lambda plan: plan["options"].update(ratio=2), "--ratio is 2"),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("verb", ["rewrite", "report"])
def test_a_plan_that_cannot_be_is_refused(
    name: str, verb: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = PLANS[name]
    change_plan(place / "run", change)
    said = refused(capsys, *(["rewrite", "run", "out"] if verb == "rewrite" else ["report", "run", "--html", "out"]))
    assert "plan.json is not a plan for this model" in said and words in said and "flap-stream plan" in said
    assert not Path("out").exists() and not Path("out.partial").exists()
    flap_stream.plan(place / "run", PlanConfig(ratio=0.3))  # as it says
    assert main(["rewrite", "run", "out", "--quiet"]) == 0


def test_a_plan_that_empties_an_expert_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_plan(place / "run-experts", in_layer("kept_neurons", lambda units: [u for u in units if u >= 96]))
    assert "an expert of layer 1 keeps no neuron" in refused(capsys, "rewrite", "run-experts", "out")


@pytest.mark.parametrize("key", ["neurons", "kv_groups", "group_cost"])
def test_sizes_that_are_not_the_models_are_refused(key: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def widen(manifest: Any) -> None:
        manifest["layers"][1][key] += 1

    change_manifest(place / "run", widen)
    assert "has sizes that differ from those of" in refused(capsys, "rewrite", "run", "out")
    assert not Path("out").exists() and not Path("out.partial").exists()


# --- one lock for the whole job ---


class Intruder:
    """Tries at every step, once the run directory is there, to store a plan of its own.

    refused: a file that is there once it was locked out.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.is_at_work, self.refused = run, False, run.parent / "refused"

    def __call__(self, _step: str) -> None:
        if self.is_at_work or not (self.run / "statistics.zarr" / "layers" / "0002").exists():
            return
        self.is_at_work = True
        try:
            flap_stream.plan(self.run, PlanConfig(ratio=0.6))
        except RunLocked:
            self.refused.touch()
        finally:
            self.is_at_work = False


def test_no_other_process_can_plan_between_the_stages_of_a_job(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    place = job.place("intruded")
    intruder = Intruder(place / "out.run")
    assert job.run(place, Fault(1, intruder, lasts=True)) == 0
    assert intruder.refused.exists()
    assert contents(place / "out") == job.expected


class IntrudedUpon:
    """The job of two ranks, of which the first plans otherwise whenever it has let go of its run directory."""

    def __init__(self, action: Callable[[], None], run: Path) -> None:
        self.action, self.run = action, run

    def __call__(self) -> None:
        from flap_stream.storage.run_directory import RunDirectory

        close, intruder = RunDirectory.close, Intruder(self.run)

        def intruded(directory: RunDirectory) -> None:
            close(directory)
            intruder("")

        RunDirectory.close = intruded  # type: ignore[method-assign, assignment]
        self.action()


def test_nor_between_the_stages_of_a_job_of_several_ranks(tmp_path: Path) -> None:
    job = RankJob(tmp_path)
    ended = launch(job.place("two"), 2, IntrudedUpon(job.action("two", keep_run=True), tmp_path / "two" / "out.run"))
    assert ended.codes == [0, 0], ended.said
    assert contents(tmp_path / "two" / "out") == job.expected


# --- arrays ---


class Payload:
    """What touches the file `ran` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def pickled(path: Path) -> None:
    """Put an array of objects in zarr format 2, which a filter unpickles, in the place of an array."""
    shutil.rmtree(path)
    path.mkdir()
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": None, "fill_value": 0}
    array |= {"order": "C", "filters": [{"id": "pickle", "protocol": 4}]}
    (path / ".zarray").write_text(json.dumps(array))
    (path / "0").write_bytes(pickle.dumps(np.array([Payload()], dtype=object)))
    for parent in path.parents:
        if parent.suffix == ".zarr" or ".zarr" in str(parent.parent):
            (parent / ".zgroup").write_text('{"zarr_format": 2}')
            (parent / "zarr.json").unlink(missing_ok=True)


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        metadata = json.loads((path / "zarr.json").read_bytes())
        (path / "zarr.json").write_text(json.dumps({**metadata, **changes}))

    return edit


def without_chunk(path: Path) -> None:
    next(file for file in path.rglob("0*") if file.is_file()).unlink()


def consolidated(path: Path) -> None:
    """Let the group's metadata say of the array what its own does not."""
    group = path.parent if path.parent.suffix == ".zarr" else path.parents[1]
    metadata = json.loads((group / "zarr.json").read_bytes())
    array = json.loads((path / "zarr.json").read_bytes()) | {"codecs": [{"name": "bytes"}]}
    inner = {"kind": "inline", "must_understand": False, "metadata": {str(path.relative_to(group)): array}}
    (group / "zarr.json").write_text(json.dumps({**metadata, "consolidated_metadata": inner}))


ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
ARRAYS: dict[str, Callable[[Path], None]] = {
    "pickled": pickled,
    "of another dtype": edited(data_type="float32"),
    "of another shape": edited(shape=[1 << 40]),
    "with other codecs": edited(codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, ZSTD]),
    "with other chunks": edited(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1]}}),
    "with storage transformers": edited(storage_transformers=[{"name": "x"}]),
    "without its chunk": without_chunk,
    "consolidated": consolidated,
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("array", ["tokens.zarr/tokens", "statistics.zarr/layers/0001/mlp/mean"])
def test_arrays_that_flap_stream_does_not_write_are_not_decoded(
    name: str, array: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)  # as before 0.16.6
    run, of_tokens = place / "run", array.startswith("tokens")
    ARRAYS[name](run / array)
    group, entry = ("tokens.zarr", "tokens") if of_tokens else ("statistics.zarr/layers/0001", "0001")
    reseal(run, "tokens" if of_tokens else "statistics", entry, files.tree_digest(run / group))
    if of_tokens:
        with (
            flap_stream.storage.run_directory.RunDirectory(run) as directory,
            pytest.raises(CorruptRun, match="is not what flap-str"),
        ):
            directory.tokens.read()
    else:
        assert "is not what flap-stream writes" in refused(capsys, "plan", "run")
    assert not Path("ran").exists()


# --- run.json and the journal ---


def at(*path: Any, value: Any) -> Callable[[Any], None]:
    def edit(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        if value is None:
            del manifest[path[-1]]
        else:
            manifest[path[-1]] = value

    return edit


DEEP: list[Any] = []
for _ in range(150):
    DEEP = [DEEP]
MANIFESTS: dict[str, Callable[[Any], None]] = {
    "many threads": at("threads", value=10**30),
    "no parameters": at("parameters", value=0),
    "no layers": at("layers", value=[]),
    "layers that are none": at("layers", value=[3]),
    "a huge layer": at("layers", 0, "neurons", value=1 << 40),
    "experts that are not the neurons": at("layers", 0, "experts", value=[1, 2]),
    "no dtype": at("options", "dtype", value=None),
    "an unknown method": at("options", "method", value="x"),
    "a batch of none": at("options", "batch_size", value=0),
    "nested": at("model", value=DEEP),
    "nested deep inside": at("model", "more", value=DEEP),
    "a shape of one": at("tokens", "shape", value=[3]),
    "tokens beyond counting": at("tokens", "shape", value=[1 << 30, 1 << 30]),
    "sources that are none": at("calibration", "sources", value=3),
    "versions that are none": at("versions", value={"torch": {}}),
    "an infinite share": at("sizes", "expert_share", value=float("inf")),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_run_json_that_cannot_be_is_refused_by_every_verb(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(place / "run", MANIFESTS[name])
    for command in ("inspect run", "report run --html a.html", "plan run", "rewrite run out", "sweep run"):
        assert "run.json is damaged" in refused(capsys, *command.split()), command
    prune = "prune model out --calibration tokens.npy --run run --samples 6 --sequence-length 16"
    assert "run.json is damaged" in refused(capsys, *prune.split())


ENTRIES = [
    {"kind": "sweep", "name": "../../secret", "digest": "0"},
    {"kind": "hidden", "name": "../0001", "layer": 1, "digest": "0"},
    {"kind": "hidden", "name": "0001", "layer": 10**400, "digest": "0"},
    {"kind": "hidden", "name": "0001", "layer": -1, "digest": "0"},
    {"kind": "batch", "name": "0/0", "step": 0, "start": 0, "size": 0},
    {"kind": "batch", "name": "0/0", "step": 0, "start": 0, "size": 1, "stop": "x"},
    {"kind": "refit", "name": "x\0", "job": "", "digest": "0"},
    {"kind": "statistics", "name": "0003", "digest": "0", "weights": "", "cost": {"seconds": float("nan")}},
    {"kind": "source", "name": "source", "embedding": "", "stamps": DEEP},
    {"kind": ["sweep"], "name": "0"},
    [1],
    7,
]


@pytest.mark.parametrize("entry", ENTRIES, ids=range(len(ENTRIES)))
def test_a_journal_entry_that_cannot_be_is_refused(entry: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = place / "run" / "journal"
    journal.write_bytes(journal_line(json.dumps(entry).encode()) + journal.read_bytes())
    for command in ("inspect run --verify", "report run --html a.html", "rewrite run out"):
        assert "journal is damaged at byte 0" in refused(capsys, *command.split()), command
