"""Devices: which one a rank takes, what counts as out of memory, and that one module alone knows kinds of devices."""

import re
from pathlib import Path

import pytest
import torch

import flap_stream
from flap_stream.engine.device import (
    HostCopy,
    choose_device,
    in_use,
    is_out_of_memory,
    limit_memory,
    own_device,
    peak_bytes,
    release,
)
from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.errors import InsufficientMemory, InvalidOption

PACKAGE = Path(flap_stream.__file__).parent
THIRD = Ranks(3, ((0,), (1, 2, 3)))


def see_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_one_module_knows_kinds_of_accelerators() -> None:
    """Elsewhere a device is a CPU or it is not; `cuda` may stand in what users read and write."""
    asks = re.compile(
        r"torch\.(cuda|xpu|mps|backends\.cuda)|\.type [!=]= \"(?!cpu)|torch\.(Stream|Event|accelerator)\b"
    )
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if asks.search(path.read_text())}
    assert found == {"engine/device.py"}


def test_each_rank_of_a_node_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    see_devices(monkeypatch, 3)
    assert [own_device(name, THIRD) for name in ("auto", "cuda", "cpu")] == ["cuda:2", "cuda:2", "cpu"]
    with pytest.raises(InvalidOption, match="one device for 3 ranks"):
        own_device("cuda:1", THIRD)
    assert own_device("cuda:1", Ranks(0, ((0,), (1, 2, 3)))) == own_device("cuda:1", ALONE) == "cuda:1"


def test_a_rank_that_is_shown_its_own_device_alone_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    see_devices(monkeypatch, 1)
    assert [own_device(name, THIRD) for name in ("auto", "cuda")] == ["cuda:0", "cuda:0"]


def test_a_device_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see_devices(monkeypatch, 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InvalidOption, match="--device cuda:2: torch sees 2 CUDA devices"):
        choose_device("cuda:2")
    see_devices(monkeypatch, 0)
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (ValueError("CUBLAS_STATUS_ALLOC_FAILED"), False),
    ],
)
def test_whoever_runs_out_of_memory_is_understood(error: Exception, says_so: bool) -> None:
    assert is_out_of_memory(error) == says_so
    with pytest.raises(InsufficientMemory if says_so else type(error)), in_use(torch.device("cpu")):
        raise error


@pytest.mark.parametrize(("code", "says_so"), [(2, True), (700, False)])
def test_the_code_of_an_accelerators_error_counts(code: int, says_so: bool) -> None:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # type: ignore[attr-defined]
    assert is_out_of_memory(error) == says_so


def test_on_a_cpu_nothing_is_limited_and_copies_are_done_at_once() -> None:
    cpu, values = torch.device("cpu"), torch.arange(3)
    limit_memory(cpu, 1)
    assert HostCopy(values).result() is values
    release(cpu)
    assert peak_bytes(cpu) == (0, 0)
