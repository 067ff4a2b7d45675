"""Run directories for tests to spoil, and how commands must refuse them."""

import shutil
from pathlib import Path

import pytest
from faults import is_one_sentence
from models import random_tokens, save, save_tokens, tiny_config, tiny_model

import flap_stream
from flap_stream.cli import main
from flap_stream.config import PlanConfig


def collect_runs(place: Path) -> Path:
    """In `place`: models, tokens, and run directories with plans, of a dense model and of a mixture of experts."""
    tokens = save_tokens(place / "tokens.npy", random_tokens(6, 16))
    for name, family in (("", "llama"), ("-experts", "mixtral")):
        model = save(tiny_model(tiny_config(family)), place / f"model{name}")
        options = flap_stream.CollectConfig(calibration=(tokens,), samples=6, sequence_length=16)
        flap_stream.collect(model, place / f"run{name}", options)
        flap_stream.plan(place / f"run{name}", PlanConfig(ratio=0.3))
    return place


def copy_runs(collected: Path, place: Path) -> Path:
    """A copy of what `collect_runs` made; the model is a link to its directory."""
    for name in ("run", "run-experts"):
        shutil.copytree(collected / name, place / name)
    (place / "model").symlink_to(collected / "model")
    shutil.copy(collected / "tokens.npy", place)
    return place


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command says that is refused in one sentence."""
    capsys.readouterr()
    assert main([*command, "--quiet"]) in (1, 2)
    said = capsys.readouterr().err
    assert is_one_sentence(said), said
    return said
