"""Models on the Hub: huggingface_hub's own code against a server on this machine that answers as the Hub does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from models import DEMO, random_tokens, save, save_tokens, tiny_config, tiny_model
from serving import served

from flap_stream.cli import main

COMMITS = {"main": "a" * 40, "older": "b" * 40}
# Open a model as every verb does, and say where it is.
OPEN = (
    "import sys; from flap_stream.cli import reported; from flap_stream.model import opening\n"
    "sys.exit(reported(lambda: print(opening.open_checkpoint(sys.argv[1]).directory)))"
)
READ_CONFIG = OPEN.replace("open_checkpoint(sys.argv[1]).directory", "read_config(sys.argv[1])[0]")


class Hub(ThreadingHTTPServer):
    """Repositories: name/gated has terms, name/model none; name/down fails; there are no others.

    folders: revision to the folder of its files. fetched: paths of all files that were asked for.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders = {COMMITS[name]: folder for name, folder in folders.items()}
        self.fetched: set[str] = set()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repository == "name/down":
            self.say(503)
        elif "bad" in self.headers.get("Authorization", ""):
            self.say(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository not in ("name/model", "name/gated"):
            self.say(*self.refusal("RepoNotFound", 404))
        elif path.startswith("/api/models/"):
            self.describe(path.removeprefix(f"/api/models/{repository}"))
        elif repository == "name/gated":
            self.say(*self.refusal("GatedRepo", 403))
        else:
            self.send_file(*path.removeprefix(f"/{repository}/resolve/").split("/", 1))

    do_HEAD = do_GET

    def refusal(self, code: str, status: int) -> tuple[int, bytes, dict[str, str]]:
        return (status if "Authorization" in self.headers else 401), b"", {"X-Error-Code": code}

    def describe(self, rest: str) -> None:
        revision = rest.rpartition("/")[2] or "main"
        commit = COMMITS.get(revision, revision)
        if commit not in self.server.folders:
            return self.say(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = [path for path in self.server.folders[commit].rglob("*") if path.is_file()]
        names = {path.relative_to(self.server.folders[commit]).as_posix(): path for path in files}
        tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": oid(p)} for n, p in names.items()]
        info = {"id": "name/model", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return self.say(200, json.dumps(tree if rest.startswith("/tree/") else info).encode())

    def send_file(self, commit: str, name: str) -> None:
        path = self.server.folders[commit] / name
        self.server.fetched.add(name)
        self.say(200, path.read_bytes(), {"ETag": f'"{oid(path)}"', "X-Repo-Commit": commit})

    def say(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("repository")
    main = save(tiny_model(tiny_config(tied=True)), place / "main")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, main / file)
    save(tiny_model(tiny_config(tied=True), seed=5), place / "older", shard_size="1GB")
    for name in ("original/params.json", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json"):
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_text("{}")
    for name in (
        "consolidated.safetensors", "model.fp16.safetensors", "model.safetensors.index.fp16.json", "tf_model.h5",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "trainer_state.json", "logo.png", "model-Q4.gguf",
    ):  # fmt: skip
        (main / name).write_text("{}")
    for name in ("additional_chat_templates/tools.jinja", "LICENSE", "README.md", "tokenizer.model"):
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_text("x")
    return {"main": main, "older": place / "older"}


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    with served(Hub(folders)) as server:
        yield server


def settings(place: Path, hub: Hub | None, **changes: str) -> dict[str, str]:
    """Of a process that takes this server for the Hub, with a cache and logins of its own."""
    endpoint = "http://127.0.0.1:9" if hub is None else f"http://127.0.0.1:{hub.server_port}"
    own = {"HF_HOME": str(place / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    shared = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**shared, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **changes}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, cwd=Path(environment["HF_HOME"]).parent, capture_output=True, text=True
    )


def test_what_the_index_names_and_the_tokenizer_needs_is_fetched_and_nothing_else(
    hub: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = run(["-c", OPEN, "name/model"], settings(tmp_path, hub))
    assert (found.returncode, found.stderr) == (0, "")
    shards = {path.name for path in folders["main"].glob("model-0*.safetensors")}
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    others = {"model.safetensors.index.json", "LICENSE", "README.md", "additional_chat_templates/tools.jinja"}
    directory = Path(found.stdout.strip())
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert len(shards) > 1 and hub.fetched == there == shards | small | others
    hub.fetched.clear()
    again = run(["-c", OPEN, "name/model"], settings(tmp_path, hub, HF_HUB_OFFLINE="1"))
    assert (again.stdout, again.stderr, hub.fetched) == (found.stdout, "", set())


def test_a_revision_is_fetched_instead(hub: Hub, tmp_path: Path) -> None:
    found = run(["-c", OPEN, "name/model@older"], settings(tmp_path, hub))
    assert COMMITS["older"] in found.stdout and "model.safetensors" in hub.fetched


@pytest.mark.parametrize(
    "command",
    [
        "prune MODEL out --calibration tokens.npy",
        "prune MODEL out --calibration tokens.npy --dry-run",
        "collect MODEL run --calibration tokens.npy",
        "evaluate MODEL --text tokens.npy",
        "bench-inference MODEL out",
    ],
)
def test_every_verb_takes_a_revision(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    save_tokens(tmp_path / "tokens.npy", random_tokens(2, 8))
    assert main([*command.replace("MODEL", "name/model").split(), "--revision", "older"]) == 2
    assert "name/model@older" in capsys.readouterr().err  # the tests are offline
    for model in ("model", "name/model@main"):
        assert main([*command.replace("MODEL", model).split(), "--revision", "older"]) == 2
        assert f"--revision older: {model} is not a Hub id" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tokens.npy"}


SENTENCES = {
    "gated": ("name/gated", {"HF_TOKEN": "good"}, 2, ("is gated and your account has no access", "request access at")),
    "not logged in": ("name/gated", {}, 2, ("is gated and you are not logged in", "hf auth login")),
    "unknown": ("name/nothing", {"HF_TOKEN": "good"}, 2, ("the Hub has no name/nothing, or your account",)),
    "unknown or private": ("name/nothing", {}, 2, ("the Hub has no name/nothing, or it is private", "hf auth login")),
    "a wrong token": ("name/model", {"HF_TOKEN": "bad"}, 2, ("the Hub refuses your token", "hf auth login")),
    "offline": ("name/model", {"HF_HUB_OFFLINE": "1"}, 2, ("incomplete in the cache", "HF_HUB_OFFLINE", "hf download")),
    "no connection": ("name/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, ("cannot be reached", "connect")),
    "out of order": ("name/down", {}, 1, ("the Hub answered 503", "wait a while")),
    "no such revision": ("name/model@nothing", {}, 2, ("name/model has no revision nothing",)),
    "no form of a Hub id": ("na--me/mod el", {}, 2, ("no such model: na--me/mod el is neither",)),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_keeps_a_model_from_being_fetched_is_told_apart(case: str, hub: Hub, tmp_path: Path) -> None:
    model, changes, code, words = SENTENCES[case]
    found = run(["-c", OPEN, model], settings(tmp_path, hub, **changes))
    assert found.returncode == code and found.stdout == ""
    assert found.stderr.startswith("flap-stream: ") and found.stderr.count("\n") == 1, found.stderr
    assert all(word in found.stderr for word in words), found.stderr
    others = [entry for name, entry in SENTENCES.items() if name != case]
    assert not any(all(word in found.stderr for word in entry[3]) for entry in others)


def test_a_half_fetched_model_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    environment = settings(tmp_path, hub)
    run(["-c", READ_CONFIG, "name/model"], environment)
    assert hub.fetched == {"config.json"}  # which is what --dry-run needs
    found = run(["-c", OPEN, "name/model"], {**environment, "HF_HUB_OFFLINE": "1"})
    assert found.returncode == 2 and "incomplete in the cache" in found.stderr
    assert run(["-c", OPEN, "name/model"], environment).returncode == 0
    cached = run(["-c", OPEN, "name/model"], {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert cached.returncode == 0 and "is taken from the Hub cache" in cached.stderr


def test_what_a_repository_holds_instead_is_named_before_it_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for name in ("model-Q4.gguf", "README.md"):
        (tmp_path / "files" / name).write_text("x")
    with served(Hub({"main": tmp_path / "files"})) as server:
        found = run(["-c", OPEN, "name/model"], settings(tmp_path, server))
    assert found.returncode == 2 and "name/model holds a GGUF file (model-Q4.gguf)" in found.stderr
    assert server.fetched == set()
