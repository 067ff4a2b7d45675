"""`doctor` names what is wrong with a machine: faults are planted one at a time."""

import errno
import fcntl
import importlib.metadata
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from test_control_groups import V2, add_group, made, mount
from warm_commands import run_warm

from flap_stream.cli import main
from flap_stream.stages import doctor
from flap_stream.stages.doctor import Finding, examine


def found_by(directory: Path, root: Path = Path("/")) -> list[Finding]:
    return list(examine(directory, root))


def only(found: list[Finding], name: str, level: str = "fault") -> str:
    """The text of the only finding of that level and name; nothing else is a fault."""
    assert {finding.name for finding in found if finding.level == "fault"} <= {name}
    (finding,) = [finding for finding in found if (finding.name, finding.level) == (name, level)]
    return finding.text


def failing(number: int) -> Any:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_machine_without_faults_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "torch 2" in said and "two jobs cannot disturb each other" in said and "/s written" in said
    assert not any(tmp_path.iterdir())


def test_a_folder_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    assert "has no file locks" in only(found_by(tmp_path), "locks")


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    levels = {finding.name: finding.level for finding in found_by(tmp_path)}
    assert (levels["locks"], levels["fsync"], levels["disk"]) == ("ok", "fault", "fault")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 5 << 20))
    assert "only 5.0 MiB are free" in only(found_by(tmp_path), "disk")
    assert main(["doctor", str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    assert [one["name"] for one in json.loads(printed.out)["findings"] if one["level"] == "fault"] == ["disk"]
    assert "1 fault found" in printed.err


def test_a_folder_that_is_read_only() -> None:
    assert "/proc/self cannot be written to" in only(found_by(Path("/proc/self/none")), "folder")


def test_a_control_group_with_a_limit(tmp_path: Path) -> None:
    root = made(tmp_path / "root", "0::/job\n", [mount(V2)])
    add_group(root, V2, "job", limit=300, used=100)
    assert "200.0 MiB may be used: a control group" in only(found_by(tmp_path, root), "memory", "note")


def test_a_machine_without_a_card(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "flap_stream", "doctor", str(tmp_path)]
    done = run_warm(command, env=environment)
    assert "no CUDA device" in done.stdout and "CPU threads" in done.stdout
    assert "decodes FP8 checkpoints while loading" in done.stdout


@pytest.mark.parametrize(("there", "words"), [(True, "as they are"), (False, "pip install kernels")])
def test_a_card_that_has_fp8(there: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(doctor, "is_kernels_available", lambda: there)
    assert words in only(found_by(tmp_path), "FP8", "ok" if there else "note")


def test_an_old_zarr_and_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def planted(name: str) -> str:
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.18.3" if name == "zarr" else version(name)

    monkeypatch.setattr("flap_stream.stages.doctor.version", planted)
    found = found_by(tmp_path)
    assert "zarr is 2.18.3; needed is <4,>=3.1: pip install" in only(found, "packages")
    (extra,) = [finding for finding in found if finding.name == "extra" and "gguf" in finding.text]
    assert extra.level == "note" and "for export-gguf: pip install 'flap-stream[gguf]'" in extra.text


def test_nobody_logged_in_and_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    found = found_by(tmp_path)
    assert "file/hub cannot be written to; set HF_HOME" in only(found, "Hub cache")
    assert any("not logged in" in finding.text for finding in found)


def test_a_clock_in_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 86_400.0)
    assert "it is 1970-01-02 here, but this package was installed on 2" in only(found_by(tmp_path), "clock")
