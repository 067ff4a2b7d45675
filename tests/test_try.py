"""Generation from a prompt: the same in memory and streamed, and the same as transformers'."""

import json
from pathlib import Path

import pytest
import torch
from models import DEMO, load
from transformers import AutoTokenizer

import flap_stream
from flap_stream.cli import main

PROMPT = "The king of the"


def test_what_is_generated_is_what_transformers_generates(pruned_demo: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(DEMO / "model"), load(pruned_demo)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    wanted = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
    (found,) = flap_stream.generate([pruned_demo], PROMPT, new_tokens=10, dtype="float32")
    assert list(found.tokens) == wanted[: len(found.tokens)] and not found.is_streamed
    assert tokenizer.decode(list(found.tokens)) == found.text and len(found.tokens) == 10


def test_a_model_that_does_not_fit_is_streamed_and_writes_the_same(
    pruned_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [DEMO / "model", pruned_demo]
    whole = list(flap_stream.generate(models, PROMPT, new_tokens=6, dtype="float32"))
    monkeypatch.setattr("flap_stream.stages.generate._ROOM", 1e9)
    streamed = list(flap_stream.generate(models, PROMPT, new_tokens=6, dtype="float32"))
    assert [one.tokens for one in streamed] == [one.tokens for one in whole]
    assert all(one.is_streamed for one in streamed) and not any(one.is_streamed for one in whole)
    assert whole[0].tokens != whole[1].tokens  # something was lost


def test_the_command_shows_both(pruned_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["try", str(pruned_demo), str(DEMO / "model"), "--prompt", PROMPT, "--new-tokens", "5"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"--- {DEMO / 'model'} (5 tokens, ") and "streamed" not in lines[0]
    assert lines[-1].startswith("--- the same up to token ")
    assert main([*command, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["model"] for one in found["generations"]] == [str(DEMO / "model"), str(pruned_demo)]
    assert main(["try", str(pruned_demo), "--new-tokens", "0"]) == 2
    assert "--new-tokens is 0" in capsys.readouterr().err
    assert main(["try", str(pruned_demo), "--device", "cpu", "--device-memory", "8GiB"]) == 2
    assert "--device-memory is the limit of a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chat-template", "always"], "--chat-template always needs a chat template, and this model's tokenizer has"),
        (["--prompt", ""], "--prompt '' has no tokens; give at least a word"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["try", str(DEMO / "model"), "--prompt", PROMPT, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_prompt_is_a_message_where_there_is_a_template(pruned_demo: Path, tmp_path: Path) -> None:
    chatting = tmp_path / "chatting"
    chatting.mkdir()
    for file in pruned_demo.iterdir():
        (chatting / file.name).write_bytes(file.read_bytes())
    (chatting / "chat_template.jinja").write_text("{{ messages[0]['content'] }} of the")
    (asked,) = flap_stream.generate([chatting], "The king", new_tokens=4)
    (told,) = flap_stream.generate([chatting], "The king of the", new_tokens=4, chat_template="never")
    assert asked.tokens == told.tokens
