"""Settings that every test runs under: no network, no progress bars, a module cache of its own for remote code."""

import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from temporary_files import remove_at_exit

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="flap-stream-tests-modules-")

import pytest
import torch
from models import DEMO, random_tokens, save, save_tokens, tiny_config, tiny_model
from transformers.utils import logging as transformers_logging

import flap_stream
from flap_stream.config import PruneConfig

# Files that take the longest, which are begun first: no worker is left alone with one at the end.
LONGEST = (
    *("families", "ranks", "prediction", "interruption", "reconstruction", "export_stock", "faults", "campaign"),
    *("depth", "simulated_device", "fp8_output", "gpu_check", "whole_experts", "model_code", "quantised"),
    *("expert_refit", "export_gguf"),
)
SPARE_EVERY = 50  # tests
_finished = count(1)
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: threads cost more than they give
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the processes that tests start
# Only a power cut loses what was not synced, and tests/faults.py keeps its own account of that.
os.fsync = lambda fd: None
# In the background of a script SIGINT is ignored, and would be in every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_measured(item: pytest.Item) -> bool:
    """Whether coverage looks: not at slow tests, nor at what a test does with other parameters than its first."""
    case = getattr(item, "callspec", None)
    return not item.get_closest_marker("slow") and not (case and any(case.indices.values()))


def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Leave most tests out of coverage, with their fixtures: tracing doubles their time, and adds few lines."""
    plugin = item.config.pluginmanager.getplugin("_cov")
    controller = None if plugin is None else plugin.cov_controller
    if controller is not None and controller.started != (measures := _is_measured(item)):
        (controller.resume if measures else controller.pause)()


def _place_of(file: str) -> int:
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _place_of(item.path.stem.removeprefix("test_")))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def spare_collector() -> None:
    """Have no collection look again at what lives now: what was imported took a third of the time of a tiny job."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    spare_collector()


def pytest_runtest_logfinish() -> None:
    """As models are imported and torch remembers operations, a collection gets five times as long in 300 tests."""
    if next(_finished) % SPARE_EVERY == 0:
        spare_collector()


def pytest_sessionfinish(exitstatus: int) -> None:
    """Leave the files of what failed, to be looked at."""
    if exitstatus == 0:
        remove_at_exit()


@pytest.fixture(autouse=True)
def _all_messages() -> None:
    """What a command line with --quiet left behind in this process."""
    logging.getLogger("flap_stream").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `model` and six windows in `tokens.npy`: to copy, not to change."""
    place = tmp_path_factory.mktemp("original")
    save(tiny_model(tiny_config()), place / "model")
    save_tokens(place / "tokens.npy", random_tokens(6, 16))
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own copy of `original`, as the working directory."""
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder where folders take room, too, which they do not in memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        (Path(folder) / "place").mkdir()
        yield Path(folder) / "place"


@pytest.fixture(scope="session")
def pruned_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, trained on real text and pruned: its layers have sizes of their own, and biases."""
    out = tmp_path_factory.mktemp("demo") / "pruned"
    text = (str(DEMO / "calibration.txt"),)
    flap_stream.prune(DEMO / "model", out, PruneConfig(ratio=0.3, calibration=text, samples=64, dtype="float32"))
    return out
