"""A place that cannot take the output is told of before any work; one that an interrupted job began is known again."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import contents, refuse

import flap_stream
from flap_stream.cli import main
from flap_stream.config import CollectConfig, PruneConfig, RewriteConfig
from flap_stream.errors import OutputConflict
from flap_stream.output.shard_writer import write_shard
from flap_stream.stages import rewrite as rewrite_stage
from flap_stream.storage import files

PRUNE = "prune model {} --calibration tokens.npy"


@pytest.fixture(params=["another file system", "a directory of the same one"])
def mounted(request: pytest.FixtureRequest, place: Path) -> Iterator[Path]:
    out, elsewhere = place / "out", place.parent / "else where"
    out.mkdir()
    elsewhere.mkdir()
    how = ["-t", "tmpfs", "tmpfs"] if request.param == "another file system" else ["--bind", str(elsewhere)]
    done = subprocess.run(["mount", *how, str(out)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("no permission to mount")
    yield out
    subprocess.run(["umount", str(out)], check=True)


def test_an_empty_mount_point_is_refused_at_once_and_a_place_in_it_serves(
    mounted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(capsys, PRUNE.format("out"), "out is a mount point", "name a place in it: out/out")
    assert main([*PRUNE.format("out/out").split(), "--quiet"]) == 0
    assert (mounted / "out" / "config.json").is_file()


@pytest.mark.parametrize("out", [".", "..", "/", "a/..", "x" * 250])
def test_an_output_without_a_usable_name_is_refused_at_once(
    out: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "is too long" if out.startswith("x") else "does not end in a name"
    refuse(capsys, PRUNE.format(out), words)
    assert main(["collect", "model", "run", "--calibration", "tokens.npy", "--quiet"]) == 0
    assert main(["plan", "run", "--quiet"]) == 0
    refuse(capsys, f"rewrite run {out}", words)


@pytest.mark.parametrize("verb", ["export-stock pruned {} --pad", "export-gguf pruned {}", "report pruned --html {}"])
def test_other_results_without_a_usable_name_are_refused_at_once(
    verb: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PRUNE.format("pruned").split(), "--quiet"]) == 0
    refuse(capsys, verb.format("."), "does not end in a name")
    refuse(capsys, verb.format("x" * 250), "is too long")


@pytest.mark.parametrize("run", ["out", "out/run", "out.partial", "../place/out", "link/out"])
def test_a_run_directory_in_the_place_of_the_output_is_refused_at_once(
    run: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to(".")
    refuse(capsys, f"{PRUNE.format('out')} --run {run}", "is at or inside the output out", "--run")


def test_rewriting_into_the_run_directory_is_refused_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "model", "run", "--calibration", "tokens.npy", "--quiet"]) == 0
    assert main(["plan", "run", "--quiet"]) == 0
    refuse(capsys, "rewrite run run", "run exists and was not made by flap-stream")
    refuse(capsys, "rewrite run ./model/out", "lies in the model's own directory")


def test_a_directory_that_may_not_be_written_is_told_of_at_once() -> None:
    # root may write anywhere; another user need not be able to read what is imported, so import first
    another_user = "os.setgroups([]); os.setuid(65534)" if os.geteuid() == 0 else "pass"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as closed:  # which another user may enter
        Path(closed).chmod(0o555)
        code = (
            "import os; from pathlib import Path; from flap_stream.storage.places import require_place; "
            f"{another_user}; require_place(Path({closed!r}, 'out'))"
        )
        found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert f"StorageFailure: {closed} is not writable" in found.stderr


def begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Interrupt a job as it publishes its output; names of the shards that are finished by then."""
    commit = files.commit_rename

    def interrupted(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise KeyboardInterrupt
        commit(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "commit_rename", interrupted)
        flap_stream.prune("model", place / "out", CONFIG)
    assert not (place / "out").exists()
    return {shard.name for shard in (place / "out.partial").glob("*.safetensors")}


CONFIG = PruneConfig(calibration=("tokens.npy",), ratio=0.4, max_shard_bytes=60_000, keep_run=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["a link", "moved", "copied", "the model through a link"])
def test_a_job_goes_on_through_another_path(way: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "work").mkdir()
    model, out = Path("model"), place / "work" / "out"
    shards = begun(place / "work", monkeypatch)
    assert len(shards) > 1
    if way == "a link":
        Path("linked").symlink_to("work")
        out = place / "linked" / "out"
    elif way == "moved":
        Path("work").rename("moved")
        out = place / "moved" / "out"
    elif way == "copied":
        shutil.copytree("work", "copied", copy_function=shutil.copy2)
        shutil.rmtree("work")
        out = place / "copied" / "out"
    else:
        Path("same").symlink_to("model")
        model = Path("same")
    written: list[str] = []
    write = write_shard

    def recorded(*arguments: Any) -> Any:
        written.append(arguments[1].name)
        return write(*arguments)

    monkeypatch.setattr(rewrite_stage, "write_shard", recorded)
    flap_stream.prune(model, out, CONFIG)
    assert written == []  # every shard was there
    shutil.rmtree(place / "fresh", ignore_errors=True)
    monkeypatch.setattr(rewrite_stage, "write_shard", write)
    flap_stream.prune(model, place / "fresh" / "out", CONFIG)
    assert contents(out) == contents(place / "fresh" / "out")
    flap_stream.prune(Path("model"), out, CONFIG)  # is complete, also by the model's own name


def test_what_another_run_began_is_left_alone_wherever_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(place, monkeypatch)
    before = contents(place / "out.partial")
    flap_stream.collect("model", "other", CollectConfig(calibration=("tokens.npy",)))
    flap_stream.plan("other", flap_stream.PlanConfig(ratio=0.4))
    with pytest.raises(OutputConflict, match=r"out.partial exists and was not made by the run in other"):
        flap_stream.rewrite("other", place / "out", RewriteConfig(max_shard_bytes=60_000))
    assert contents(place / "out.partial") == before
