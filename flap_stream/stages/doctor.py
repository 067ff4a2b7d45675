"""`doctor`: what on this machine, and of a folder on it, would keep a job from running or slow it down."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from transformers.utils.import_utils import KERNELS_MIN_VERSION, is_kernels_available

from flap_stream.engine import control_groups
from flap_stream.engine.device import card, choose_device, compute_capability, free_bytes
from flap_stream.errors import FlapStreamError
from flap_stream.progress import format_bytes
from flap_stream.stages.machine_rates import disk_rates
from flap_stream.storage import files
from flap_stream.storage.run_lock import acquire_lock

_LEAST_DISK = 1 << 30  # free bytes below which hardly any model fits
_SLOW_DISK = 100e6  # bytes per second: the layers of a 65B model then take 20 minutes to read
_RUNS_FP8 = (8, 9)  # compute capability; see FineGrainedFP8HfQuantizer of transformers
_EXTRAS = {
    "gguf": "export-gguf",
    "plots": "report",
    "lm-eval": "lm-evaluation-harness",
    "sentencepiece": "tokenizers without tokenizer.json",
}


@dataclass(frozen=True)
class Finding:
    """What was found of one thing. level: `ok`, `note` (something is not possible) or `fault` (jobs will fail)."""

    level: str
    name: str
    text: str


def examine(directory: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield findings about this machine and a folder for results, one by one; rates take seconds to measure.

    root: the directory that contains /proc and the mounted control groups.
    """
    yield from _packages()
    yield from _clock()
    yield from _device()
    yield _fp8()
    yield _memory(root)
    yield from _folder(directory)
    yield from _hub()


def _packages() -> Iterator[Finding]:
    """Versions of what is needed, and which extras are missing."""
    needed = [Requirement(text) for text in requires("flap-stream") or []]
    always = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [text for one in always if (text := _unmet(one))]
    for text in wrong:
        yield Finding("fault", "packages", text)
    if not wrong:
        names = ("flap-stream", "torch", "transformers", "zarr", "safetensors")
        found = ", ".join(f"{name} {version(name)}" for name in names)
        yield Finding("ok", "packages", f"Python {sys.version.split()[0]}, {found}")
    for extra, serves in _EXTRAS.items():
        own = [one for one in needed if one not in always and one.marker and one.marker.evaluate({"extra": extra})]
        if missing := [one.name for one in own if _unmet(one)]:
            text = f"no {', '.join(missing)}, for {serves}: pip install 'flap-stream[{extra}]'"
            yield Finding("note", "extra", text)


def _unmet(needed: Requirement) -> str | None:
    """What is wrong with an installed package; None if nothing."""
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        return f"{needed.name} is not installed: pip install '{needed.name}{needed.specifier}'"
    if needed.specifier.contains(found, prereleases=True):
        return None
    return f"{needed.name} is {found}; needed is {needed.specifier}: pip install '{needed.name}{needed.specifier}'"


def _clock() -> Iterator[Finding]:
    """A clock that is behind makes certificates invalid, and `report` and snapshots older than what they are of."""
    made = Path(__file__).stat().st_mtime
    if time.time() < made:
        now, then = (time.strftime("%Y-%m-%d", time.gmtime(seconds)) for seconds in (time.time(), made))
        yield Finding("fault", "clock", f"it is {now} here, but this package was installed on {then}; set the clock")


def _device() -> Iterator[Finding]:
    device = choose_device("auto")
    found = card(device)
    if found is None:
        threads = torch.get_num_threads()
        text = f"no CUDA device that torch {torch.__version__} can use: jobs run on {threads} CPU threads"
        yield Finding("note", "device", text)
    else:
        yield Finding("ok", "device", f"{found[0]}: {format_bytes(free_bytes(device))} free")


def _fp8() -> Finding:
    """Whether transformers runs FP8 checkpoints as they are here."""
    if compute_capability(choose_device("auto")) >= _RUNS_FP8:
        if not is_kernels_available():
            package = f"kernels=={KERNELS_MIN_VERSION}"
            text = f"for FP8 checkpoints transformers needs a package that is not here: pip install {package}"
            return Finding("note", "FP8", text)
        return Finding("ok", "FP8", "transformers runs FP8 checkpoints as they are")
    least = ".".join(map(str, _RUNS_FP8))
    text = f"no GPU of compute capability {least} or later: transformers decodes FP8 checkpoints while loading"
    return Finding("note", "FP8", text)


def _memory(root: Path) -> Finding:
    free, allowed = psutil.virtual_memory().available, control_groups.free_bytes(root)
    if allowed is not None and allowed < free:
        text = (
            f"{format_bytes(allowed)} may be used: a control group limits this process (of {format_bytes(free)} free)"
        )
        return Finding("note", "memory", text)
    return Finding("ok", "memory", f"{format_bytes(free)} free")


def _folder(directory: Path) -> Iterator[Finding]:
    """Whether results and a run directory can be kept in a folder."""
    place = files.existing_directory(directory.absolute())
    try:
        own = Path(tempfile.mkdtemp(prefix=".flap-stream-doctor-", dir=place))
    except OSError as error:
        yield Finding("fault", "folder", f"{place} cannot be written to ({error.strerror}); name another folder")
        return
    try:
        yield from _tried("locks", lambda: os.close(acquire_lock(own)), "two jobs cannot disturb each other")
        yield from _tried("fsync", lambda: _sync(own), "what is written survives a power cut")
        yield from _space(place)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _tried(name: str, action: Callable[[], object], meaning: str) -> Iterator[Finding]:
    try:
        action()
    except (FlapStreamError, OSError) as error:
        yield Finding("fault", name, str(error))
    else:
        yield Finding("ok", name, meaning)


def _sync(directory: Path) -> None:
    files.write_committed(directory / "probe", b"probe")
    files.sync_directory(directory)


def _space(place: Path) -> Iterator[Finding]:
    free = files.free_bytes(place)
    if free < _LEAST_DISK:
        text = f"only {format_bytes(free)} are free in {place}; `prune --dry-run` says what a job needs"
        yield Finding("fault", "disk", text)
        return
    try:
        read, written = disk_rates(place, None)
    except OSError as error:
        yield Finding("fault", "disk", f"writing to {place} failed ({error.strerror}); check the disk")
        return
    rates = f"{format_bytes(free)} free, {format_bytes(read)}/s read, {format_bytes(written)}/s written"
    yield Finding("note" if min(read, written) < _SLOW_DISK else "ok", "disk", f"{rates} in {place}")


def _hub() -> Iterator[Finding]:
    """Whether models can be fetched and pushed."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE).absolute()
    is_blocked = any(path.exists() and not path.is_dir() for path in (cache, *cache.parents))
    if is_blocked or not os.access(files.existing_directory(cache), os.W_OK):
        text = f"the cache {constants.HF_HUB_CACHE} cannot be written to; set HF_HOME to a folder that can"
        yield Finding("fault", "Hub cache", text)
    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "Hub", "HF_HUB_OFFLINE is set: only models in the cache are found")
    if get_token() is None:
        yield Finding("note", "Hub", "not logged in: gated models and push need `hf auth login`, or HF_TOKEN")
    else:
        yield Finding("ok", "Hub", "a token is there")
