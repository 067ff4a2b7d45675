"""Files that someone else has put into a run directory, a model or an output: none is followed or read without end."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from models import DEMO, contents
from run_directories import collect_runs, copy_runs, refused

from flap_stream.cli import main
from flap_stream.errors import StorageFailure
from flap_stream.storage import files


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect_runs(tmp_path_factory.mktemp("collected"))


@pytest.fixture
def place(collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_runs(collected, tmp_path)


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
        assert main(["rewrite", "run", "out"]) == 0  # of no use to anyone, and never read
        return
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


def test_what_is_written_does_not_follow_links(place: Path, victim: Path) -> None:
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
