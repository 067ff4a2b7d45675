"""A run directory that someone else made or changed, digests and all: a sentence, and nothing is believed or run."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, contents, is_one_sentence, make_job
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from rank_jobs import RankJob, launch

import flap_stream
from flap_stream import run_manifest
from flap_stream.cli import main
from flap_stream.config import PlanConfig
from flap_stream.errors import RunLocked


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


def refused(capsys: pytest.CaptureFixture, *command: str) -> str:
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
    "twice": (in_layer("kept_neurons", lambda u: [u[0], *u]), "neurons of layer 1 are not in order, each once"),
    "in no order": (in_layer("kept_kv_groups", lambda u: [1, 0]), "KV groups of layer 1 are not in order, each once"),
    "group too large": (in_layer("kept_kv_groups", lambda u: [0, 2]), "KV groups of layer 1 are not all from 0 to 1"),
    "a truth value": (in_layer("kept_neurons", lambda u: [True]), "neurons of layer 1 are not all"),
    "nested": (in_layer("kept_neurons", lambda u: [[0]]), "neurons of layer 1 are not all"),
    "a layer less": (lambda plan: plan["layers"].pop() and None, "it has 2 layers, the model 3"),
    "no layers": (lambda plan: plan.pop("layers") and None, "it has another form"),
    "no object": (lambda plan: [1], "it has another form"),
    "deep": (lambda plan: plan.update(layers=json.loads("[" * 200 + "]" * 200)), "nested too deeply"),
    "another option": (lambda plan: plan["options"].update(colour=1), "colour"),
    "an option of another type": (lambda plan: plan["options"].update(ratio="0.3"), "its option ratio is 0.3"),
    "an option out of range": (lambda plan: plan["options"].update(ratio=2), "--ratio is 2"),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("verb", ["rewrite", "report"])
def test_a_plan_that_cannot_be_is_refused(name: str, verb: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    change, words = PLANS[name]
    change_plan(place / "run", change)
    said = refused(capsys, *(["rewrite", "run", "out"] if verb == "rewrite" else ["report", "run", "--html", "out"]))
    assert "plan.json is no plan for this model" in said and words in said and "flap-stream plan" in said
    assert not Path("out").exists() and not Path("out.partial").exists()
    flap_stream.plan(place / "run", PlanConfig(ratio=0.3))  # as it says
    assert main(["rewrite", "run", "out", "--quiet"]) == 0


def test_a_plan_that_empties_an_expert_is_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    change_plan(place / "run-experts", in_layer("kept_neurons", lambda units: [u for u in units if u >= 96]))
    assert "an expert of layer 1 keeps no neuron" in refused(capsys, "rewrite", "run-experts", "out")


@pytest.mark.parametrize("key", ["neurons", "kv_groups", "group_cost"])
def test_sizes_that_are_not_the_models_are_refused(key: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    def widen(manifest: Any) -> None:
        manifest["layers"][1][key] += 1

    change_manifest(place / "run", widen)
    assert "has other sizes than" in refused(capsys, "rewrite", "run", "out")
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
        from flap_stream.store import RunDirectory

        close, intruder = RunDirectory.close, Intruder(self.run)

        def intruded(directory: RunDirectory) -> None:
            close(directory)
            intruder("")

        RunDirectory.close = intruded
        self.action()


def test_nor_between_the_stages_of_a_job_of_several_ranks(tmp_path: Path) -> None:
    job = RankJob(tmp_path)
    ended = launch(job.place("two"), 2, IntrudedUpon(job.action("two", keep_run=True), tmp_path / "two" / "out.run"))
    assert ended.codes == [0, 0], ended.said
    assert contents(tmp_path / "two" / "out") == job.expected
