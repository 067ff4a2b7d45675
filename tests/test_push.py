"""Pruned checkpoints on the Hub: huggingface_hub's own uploading against a server that answers as the Hub does."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from models import DEMO
from serving import served

import flap_stream
from flap_stream.cli import main
from flap_stream.errors import InvalidOption
from flap_stream.export.advice import USED, advise

COMMIT = "c" * 40
LARGE = ".safetensors"


class Hub(ThreadingHTTPServer):
    """A Hub where name/... may be written to.

    files: contents by path; blobs: what was uploaded to large-file storage, by sha256. sent: sha256 of what was sent
    there, in order. fails_after: how many large files are taken before the storage fails; None never.
    loses: a file that is not what was sent.
    """

    def __init__(self, place: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.place = place
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.private: list[bool] = []
        self.fails_after: int | None = None
        self.loses = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "bad" in self.headers.get("Authorization", ""):
            self.say({"error": "no"}, 403)
        elif self.path == "/api/repos/create":
            self.server.private.append(json.loads(body).get("visibility") == "private")
            self.say({"url": f"{self.server.url}/name/pruned"})
        elif self.path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif "/name/pruned" not in self.path:  # as the Hub does for a name without its owner
            self.say({"error": "Repository not found"}, 404)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            self.say({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.say({"transfer": "basic", "objects": [self.wanted(each) for each in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.decode().splitlines()])
        elif "/paths-info/" in self.path:
            self.say([described(name, data) for name, data in self.server.files.items()])
        else:
            self.say({}, 404)

    def do_PUT(self) -> None:
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if server.fails_after is not None and len(server.sent) >= server.fails_after:
            return self.say({}, 507)
        server.sent.append(hashlib.sha256(body).hexdigest())
        server.blobs[server.sent[-1]] = body
        return self.say({})

    def wanted(self, each: dict[str, Any]) -> dict[str, Any]:
        """Large files that are there need no upload."""
        upload = {"upload": {"href": f"{self.server.url}/storage/{each['oid']}"}}
        return {**each, **({} if each["oid"] in self.server.blobs else {"actions": upload})}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        if self.server.loses:
            self.server.files[self.server.loses] += b" "
        url = f"{self.server.url}/name/pruned/commit/{COMMIT}"
        self.say({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def say(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def described(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}}
    return {"type": "file", "path": name, "size": len(data), "oid": oid, **(large if name.endswith(LARGE) else {})}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with served(Hub(tmp_path)) as server:
        yield server


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, pruned from its directory into several shards."""
    place = tmp_path_factory.mktemp("push") / "pruned"
    text = str(DEMO / "calibration.txt")
    flap_stream.prune(DEMO / "model", place, ratio=0.3, calibration=text, samples=16, max_shard_bytes=1_000_000)
    return place


def push(hub: Hub, *arguments: object, **changes: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "good",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(hub.place / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "flap_stream", "push", *map(str, arguments)]
    return subprocess.run(command, env={**environment, **changes}, check=False, capture_output=True, text=True)


def test_what_is_there_is_what_was_pruned_with_a_card_that_says_how(hub: Hub, out: Path) -> None:
    text = str(DEMO / "evaluation.txt")
    before = flap_stream.evaluate(DEMO / "model", text=text, samples=50, save=out).perplexity
    after = flap_stream.evaluate(out, text=text, samples=50, save=out).perplexity
    flap_stream.evaluate(out, text=text, samples=50, save=str(out))  # again: it is noted once
    done = push(hub, out, "name/pruned", "--base-model", "name/dense", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == COMMIT and hub.private == [True]
    own = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "evaluations.json"}
    assert hub.files.keys() == own.keys() and json.loads(done.stdout)["files"] == len(own)
    assert {name for name in own if own[name] != hub.files[name]} == {"README.md", "SHA256SUMS"}
    lines = hub.files["SHA256SUMS"].decode().splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    assert sums == {n: hashlib.sha256(d).hexdigest() for n, d in hub.files.items() if n != "SHA256SUMS"}
    card = ModelCard(hub.files["README.md"].decode())
    data = yaml.safe_load(card.data.to_yaml())
    (result,) = model_index_to_eval_results(data["model-index"])[1]
    assert data["base_model"] == "name/dense" and result.metric_value == pytest.approx(after, abs=1e-4)
    assert f"| {before:.2f} | {after:.2f} |" in card.text and "--recipe recipe.toml" in card.text
    assert "samples = 16" in card.text and "torch 2" in card.text


def test_what_is_advised_ends_with_a_documented_checkpoint_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = advise(DEMO / "model", context=128).forms[0]
    gpu = int(0.85 * (dense.weight_bytes + dense.kv_bytes) / USED)
    command = ["advise", str(DEMO / "model"), "--gpu", str(gpu), "--context", "128", "--form", dense.name]
    assert main(command) == 0
    prune, evaluate, last = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "][-3:]
    assert main([*prune, "--calibration", str(DEMO / "calibration.txt"), "--samples", "32"]) == 0
    assert main([*evaluate, "--text", str(DEMO / "evaluation.txt"), "--samples", "20"]) == 0
    assert last[:3] == ["push", "pruned", "NAMESPACE/model-pruned"]
    done = push(hub, *last[1:])
    assert done.returncode == 0, done.stderr
    card = hub.files["README.md"].decode()
    assert "base_model: NAMESPACE/NAME" in card and 'metric = "fisher"' in card and "## Perplexity" in card


def test_a_repository_may_be_named_without_its_owner(hub: Hub, out: Path) -> None:
    done = push(hub, out, "pruned", "--base-model", "name/dense")
    assert done.returncode == 0, done.stderr
    assert "README.md" in hub.files


def test_an_upload_that_failed_goes_on_where_it_was(hub: Hub, out: Path) -> None:
    shards = len(list(out.glob(f"*{LARGE}")))
    assert shards >= 3
    hub.fails_after = 1
    done = push(hub, out, "name/pruned", "--base-model", "name/dense")
    assert done.returncode == 1 and "what was uploaded is not sent again" in done.stderr and not hub.files
    hub.fails_after = None
    assert push(hub, out, "name/pruned", "--base-model", "name/dense").returncode == 0
    assert len(hub.sent) == len(set(hub.sent)) == shards


SENTENCES: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "no base model": ([], {}, 2, "was made from a directory, model; give the Hub id"),
    "no Hub id": (["--base-model", "dense"], {}, 2, "--base-model 'dense' is not a Hub id"),
    "not logged in": (["--base-model", "a/b"], {"HF_TOKEN": ""}, 2, "you are not logged in; run `hf auth login`"),
    "a wrong token": (["--base-model", "a/b"], {"HF_TOKEN": "bad"}, 2, "refuses your token for name/pruned (403)"),
    "offline": (["--base-model", "a/b"], {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE forbids uploading"),
    "no connection": (["--base-model", "a/b"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "cannot be reached"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SENTENCES)
def test_what_keeps_a_model_from_being_pushed_is_told_apart(case: str, hub: Hub, out: Path) -> None:
    arguments, changes, code, words = SENTENCES[case]
    done = push(hub, out, "name/pruned", *arguments, **changes)
    assert done.returncode == code and done.stdout == "" and words in done.stderr
    assert done.stderr.count("\n") == 1 and not hub.files


def test_only_what_is_as_it_was_written_is_pushed(hub: Hub, out: Path, tmp_path: Path) -> None:
    done = push(hub, tmp_path / "none", "name/pruned")
    assert done.returncode == 2 and "is not a pruned checkpoint" in done.stderr
    (tmp_path / "out").mkdir()
    for file in out.iterdir():
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    done = push(hub, tmp_path / "out", "name/pruned", "--base-model", "a/b")
    assert done.returncode == 2 and "is not as it was written: tokenizer.json is altered" in done.stderr
    hub.loses = "config.json"
    done = push(hub, out, "name/pruned", "--base-model", "a/b")
    assert done.returncode == 1 and "config.json not as sent; run the same command again" in done.stderr


def test_evaluations_are_saved_in_pruned_checkpoints_alone(out: Path) -> None:
    text = str(DEMO / "evaluation.txt")
    with pytest.raises(InvalidOption, match="is not a pruned checkpoint"):
        flap_stream.evaluate(out, text=text, samples=2, save=DEMO)
    saved = out / "evaluations.json"
    kept = saved.read_bytes() if saved.exists() else b"[]"
    saved.write_text("{")
    with pytest.raises(InvalidOption, match="is damaged; delete it"):
        flap_stream.evaluate(out, text=text, samples=2, save=out)
    saved.write_bytes(kept)


def test_evaluations_of_a_dense_model_are_not_those_of_what_is_pruned_from_it(out: Path, tmp_path: Path) -> None:
    (out / "evaluations.json").write_text("[]")
    text = str(DEMO / "calibration.txt")
    flap_stream.prune(out, tmp_path / "again", ratio=0.1, calibration=text, samples=4)
    assert (tmp_path / "again" / "recipe.toml").exists() and not (tmp_path / "again" / "evaluations.json").exists()
