"""`report --watch`: the page of a job that runs."""

import os
import signal
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from serving import served

import flap_stream
from flap_stream.cli import main
from flap_stream.progress import format_bytes
from flap_stream.report.live import REFRESH_SECONDS, Watch, read_status
from flap_stream.storage.collected import StatisticsStore
from flap_stream.storage.run_directory import RunDirectory

pytest.importorskip("matplotlib")


def got(server: Watch, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_the_page_of_a_job_that_runs_says_how_far_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    write = StatisticsStore.write
    with served(Watch(place / "run")) as server:
        assert "has not begun, or has finished" in got(server)[1]

        def write_and_look(store: StatisticsStore, layer: int, *arguments: Any) -> None:
            write(store, layer, *arguments)
            seen.append(got(server)[1])

        monkeypatch.setattr(StatisticsStore, "write", write_and_look)
        collected = flap_stream.collect("model", "run", calibration="tokens.npy", loss_windows=4)
        done = got(server)[1]
    assert collected.measured.placement is not None
    promised = format_bytes(collected.measured.placement.host_bytes)
    assert all(f"is predicted to use at most {promised}." in page for page in (*seen, done))
    assert f"pid {os.getpid()} on ".capitalize() in seen[0] and "at its peak" in seen[0]
    assert "<td>collect</td><td>1 of 3</td>" in seen[0] and "minutes more" in seen[0] and "tokens/s" in seen[0]
    assert "<td>collect</td><td>3 of 3</td>" in done and "<td>gradient of the loss</td><td>3 of 3</td>" in done
    assert "minutes more" not in done and f'content="{REFRESH_SECONDS}"' in done and "<svg" in done


def test_what_is_left_is_known_from_the_layers_done(place: Path) -> None:
    flap_stream.collect("model", "run", calibration="tokens.npy")
    flap_stream.plan("run", ratio=0.3)
    flap_stream.rewrite("run", "out", restore="least-squares")
    with RunDirectory(place / "run", is_writer=False) as run:
        status = read_status(run)
    assert status.stages == [("collect", 3, 3), ("plan", 1, 1), ("refit", 3, 3), ("shards written", 1, None)]
    assert status.seconds_left == 0 and status.tokens_per_second is not None


def test_it_is_for_this_machine_only_and_read_only(place: Path) -> None:
    flap_stream.collect("model", "run", calibration="tokens.npy")
    before = _files(place / "run")
    with served(Watch(place / "run")) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert got(server, "/run.json")[0] == 404 and got(server, host="evil.example:80")[0] == 404
        assert got(server, method="POST")[0] == 501 and got(server, host=f"localhost:{server.server_port}")[0] == 200
        assert got(server, host="localhost")[0] == 200  # at port 80 a browser leaves it out
        assert _files(place / "run") == before
        (place / "run" / "run.json").write_text("{")
        assert "is damaged" in got(server)[1]


def _files(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_the_command_serves_until_it_is_interrupted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "flap_stream", "report", "run", "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert said.startswith("http://127.0.0.1:") and "ssh -L" in said and process.returncode == 0
    assert main(["report", "run", "--watch", "99999"]) == 2
    assert main(["report", "run", "--watch", "--html", "page.html"]) == 2
    assert "port cannot be used" in (errors := capsys.readouterr().err) and "leave out --html" in errors
