"""A run directory that someone else made or changed, digests and all: a sentence, and nothing is believed or run."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
from faults import Fault, contents, is_one_sentence, make_job
from models import DEMO, random_tokens, save, save_tokens, tiny_config, tiny_model
from rank_jobs import RankJob, launch

import flap_stream
from flap_stream.cli import main
from flap_stream.config import PlanConfig
from flap_stream.errors import CorruptRun, RunLocked, StorageFailure
from flap_stream.storage import files, run_manifest


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, tokens, and a run directory with a plan, which also fits a mixture of experts."""
    place = tmp_path_factory.mktemp("collected")
    tokens = save_tokens(place / "tokens.npy", random_tokens(6, 16))
    for name, family in (("", "llama"), ("-experts", "mixtral")):
        model = save(tiny_model(tiny_config(family)), place / f"model{name}")
        options = flap_stream.CollectConfig(calibration=(tokens,), samples=6, sequence_length=16)
        flap_stream.collect(model, place / f"run{name}", options)
        flap_stream.plan(place / f"run{name}", PlanConfig(ratio=0.3))
    return place


@pytest.fixture
def place(collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("run", "run-experts"):
        shutil.copytree(collected / name, tmp_path / name)
    (tmp_path / "model").symlink_to(collected / "model")
    shutil.copy(collected / "tokens.npy", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command says that is refused in one sentence."""
    capsys.readouterr()
    assert main([*command, "--quiet"]) in (1, 2)
    said = capsys.readouterr().err
    assert is_one_sentence(said), said
    return said


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
    """Tries at every step, once the run directory is there, to store a plan of its own."""

    def __init__(self, run: Path) -> None:
        self.run, self.is_at_work = run, False

    def __call__(self, _step: str) -> None:
        if self.is_at_work or not (self.run / "statistics.zarr" / "layers" / "0002").exists():
            return
        self.is_at_work = True
        try:
            flap_stream.plan(self.run, PlanConfig(ratio=0.6))
        except RunLocked:
            pass
        finally:
            self.is_at_work = False


def test_no_other_process_can_plan_between_the_stages_of_a_job(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    place = job.place("intruded")
    assert job.run(place, Fault(1, Intruder(place / "out.run"), lasts=True)) == 0
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


# --- nothing that never ends is read ---


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def giant(path: Path) -> None:
    """A terabyte that takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


ENDLESS = [fifo, device, giant]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ENDLESS)
@pytest.mark.parametrize(
    "file", ["run.json", "journal", "plan.json", "statistics.zarr/layers/0001/mlp/mean/c/0", "hidden/0002.bin", "lock"]
)
def test_nothing_endless_is_read_in_a_run_directory(
    how: Callable[[Path], None], file: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how(place / "run" / file)
    if how is giant and file in ("hidden/0002.bin", "lock"):
        return  # of no use to anyone, and never read
    for command in ("inspect run --verify", "report run --html a.html", "rewrite run out", "plan run"):
        if command != "plan run" or file != "plan.json" or how is not giant:  # which is made again
            refused(capsys, *command.split())


@pytest.mark.timeout(100)
@pytest.mark.parametrize("how", ENDLESS)
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "README.md"]
)
def test_nothing_endless_is_read_in_a_model(
    how: Callable[[Path], None], file: str, collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(collected / "model", tmp_path / "model")
    (tmp_path / "a.txt").write_text("In the beginning " * 50)
    how(tmp_path / "model" / file)
    text = str(tmp_path / "a.txt")
    said = refused(capsys, "prune", str(tmp_path / "model"), str(tmp_path / "out"), "--calibration", text)
    assert file in said
    assert refused(capsys, "evaluate", str(tmp_path / "model"), "--text", text)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ENDLESS)
@pytest.mark.parametrize("file", ["a.txt", "a.jsonl", "a.npy", "a.parquet"])
def test_nothing_endless_is_read_for_a_text(
    how: Callable[[Path], None], file: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "model", place / "own")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, place / "own")
    how(place / file)
    assert file in refused(capsys, "prune", "own", "out", "--calibration", file)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ENDLESS)
@pytest.mark.parametrize("file", ["pruning.json", "SHA256SUMS", "config.json", "model.safetensors"])
def test_nothing_endless_is_read_in_an_output(
    how: Callable[[Path], None], file: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rewrite", "run", "out", "--quiet"]) == 0
    how(place / "out" / file)
    refused(capsys, "inspect", "out", "--verify")


# --- links that someone has put in the way ---


@pytest.fixture
def victim(place: Path) -> Path:
    (place / "victim").write_text("years of work")
    return place / "victim"


PRUNE = "prune model out --calibration tokens.npy --samples 6 --sequence-length 16 --quiet"


def test_temporary_files_do_not_follow_links(place: Path, victim: Path) -> None:
    (place / "out.run").mkdir()
    (place / "out.run" / "run.json.partial").symlink_to(victim)
    assert main(PRUNE.split()) == 0
    for link in ("a.html.partial", "a.gguf.partial"):
        (place / link).symlink_to(victim)
    assert main(["report", "run", "--html", "a.html", "--quiet"]) == 0
    assert main(["export-gguf", str(DEMO / "model"), "a.gguf", "--quiet"]) == 0
    assert victim.read_text() == "years of work"
    assert not Path("a.html").is_symlink() and not Path("a.gguf").is_symlink()


def test_a_shard_is_not_written_through_a_link(place: Path, victim: Path) -> None:
    target = place / "shard"
    (place / "shard.partial").symlink_to(victim)
    files.write_committed(target, b"new")
    assert victim.read_text() == "years of work" and target.read_bytes() == b"new"
    (place / "journal").symlink_to(victim)
    with pytest.raises(StorageFailure):
        files.append_committed(place / "journal", b"new")
    assert victim.read_text() == "years of work"


@pytest.mark.parametrize("name", ["lock", "hidden", "journal.partial", "refit", "sweeps", "statistics.zarr/layers/x"])
def test_a_run_directory_with_links_in_it_is_refused(
    name: str, place: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine").mkdir()
    victim = victim.rename(place / "mine" / "0001.bin")
    link = place / "run" / name
    files.remove(link)
    link.symlink_to(victim if name in ("lock", "journal.partial") else place / "mine")
    prune = "prune model out --calibration tokens.npy --run run --samples 6 --sequence-length 16"
    for command in (prune, "rewrite run out", "plan run", "inspect run --verify"):
        assert f"{name} is a link" in refused(capsys, *command.split())
    assert victim.read_text() == "years of work"


def test_a_lock_that_is_another_file_as_well_is_not_written(place: Path, victim: Path) -> None:
    (place / "run" / "lock").unlink()
    os.link(victim, place / "run" / "lock")
    assert main(["plan", "run", "--quiet"]) == 2
    assert victim.read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
@pytest.mark.parametrize("name", ["out.run", "out.partial"])
def test_a_directory_that_another_user_has_made_is_refused(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "out.partial":
        assert main(["rewrite", "run", "out", "--quiet"]) == 0
        shutil.rmtree("out")  # the run has begun to write there
        shutil.copytree("run", "out.run")
    Path(name).mkdir()
    os.chown(name, 1234, 1234)
    command = PRUNE if name == "out.run" else "rewrite run out"
    said = refused(capsys, *command.replace(" --quiet", "").split())
    assert f"{name} belongs to another user (uid 1234)" in said
    assert list(Path(name).iterdir()) == []


# --- what goes with a model ---


def carried(place: Path, model: Path) -> dict[str, bytes]:
    assert main(["rewrite", "run", "out", "--model", str(model)]) == 0
    return contents(place / "out")


def test_a_licence_that_links_elsewhere_is_left_out(
    place: Path, victim: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(place / "model", place / "own")
    (place / "own" / "LICENSE").symlink_to(victim)
    (place / "own" / "tokenizer.json").symlink_to("/proc/self/environ")
    (place / "own" / "texts").mkdir()
    (place / "own" / "texts" / "notice").write_text("mine")
    (place / "own" / "NOTICE").symlink_to("texts/notice")
    giant(place / "own" / "USE_POLICY.md")
    os.truncate(place / "own" / "USE_POLICY.md", 20 << 20)
    found = carried(place, place / "own")
    assert not {"LICENSE", "tokenizer.json", "USE_POLICY.md"} & found.keys()
    assert found["NOTICE"] == b"mine"
    assert b"years of work" not in b"".join(found.values())
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "LICENSE is left out of the result: it links to" in said and "USE_POLICY.md is left out" in said


def test_the_links_of_a_hub_cache_are_carried(place: Path) -> None:
    blobs, snapshot = (place / "models--a--b" / name for name in ("blobs", "snapshots/0123"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate([*(place / "model").resolve().iterdir(), place / "LICENSE"]):
        shutil.copy(file, blobs / str(number)) if file.exists() else (blobs / str(number)).write_text("a licence")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert carried(place, snapshot)["LICENSE"] == b"a licence"
