"""A CUDA device simulated over host memory: streams, events, a caching allocator, page-locked memory.

Work is queued on the current stream, and runs when an event, a wait of the host or the policy says so. Memory that is
allocated is filled with NaN on the stream that it is allocated for, as is new page-locked host memory. So
whatever is used too early or reused too soon shows as a wrong result under one of the policies. What a real device
would refuse (tensors of two devices in one operation, more memory than there is) is refused.

Every time the host waits for the device, the line of the package that made it wait is counted.
"""

import os
import random
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # which makes subclasses of what is replaced here
from torch.utils._python_dispatch import _disable_current_modes

import flap_stream
from flap_stream.engine import device

POLICIES = ("eager", "lazy", "copies first", "computations first", "random")
PACKAGE = f"{Path(flap_stream.__file__).parent}/"
DEVICE = torch.device("cuda", 0)
torch.utils.rename_privateuse1_backend("simulated")
BACKEND = torch.device("simulated", 0)  # what torch's own code takes the device for
_STREAMS = 3  # in the pool that new streams come from, in turn; torch has 32
_GRANULE = 512  # bytes that an allocation is rounded to

Operation = Callable[[], Any]


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks a backend; there is one only while it is simulated."""

    in_use = False

    def is_available(self) -> bool:
        return self.in_use

    is_built = is_available

    def has_primary_context(self, _device: int) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


_HOOKS, _GUARD = _Hooks(), _Guard()
torch._C._acc.register_python_privateuseone_hook(_HOOKS)
torch._C._acc.register_python_privateuseone_device_guard(_GUARD)
torch._register_device_module(
    BACKEND.type,
    SimpleNamespace(
        is_initialized=lambda: True,
        is_available=_HOOKS.is_available,
        current_device=lambda: 0,
        device_count=lambda: 1,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        manual_seed_all=lambda seed: None,
    ),
)


class Stream:
    """A queue of operations, which run in order; an operation may be a wait for another queue to get somewhere."""

    def __init__(self, simulator: "Simulator") -> None:
        self.simulator, self.device = simulator, DEVICE
        self.queued = self.done = 0
        self._operations: deque[tuple[int, Operation | None, tuple[Stream, int] | None]] = deque()
        self._outer: list[Stream] = []

    def push(self, operation: Operation | None, after: "tuple[Stream, int] | None" = None) -> None:
        with self.simulator.lock:
            self.queued += 1
            self._operations.append((self.queued, operation, after))
            self.simulator.schedule()

    def run_until(self, place: int) -> None:
        """Run operations up to one of them, and what they wait for in other queues."""
        with self.simulator.lock:
            while self._operations and self._operations[0][0] <= place:
                number, operation, after = self._operations.popleft()
                if after is not None:
                    after[0].run_until(after[1])
                if operation is not None:
                    run(operation)
                self.done = number

    def step(self) -> bool:
        """Run one operation; returns whether there was one that waits for nothing."""
        with self.simulator.lock:
            if not self._operations:
                return False
            number, _, after = self._operations[0]
            if after is not None and after[0].done < after[1]:
                return False
            self.run_until(number)
            return True

    def wait_event(self, event: "Event") -> None:
        if event.place is not None:
            self.push(None, event.place)

    def wait_stream(self, other: "Stream") -> None:
        self.push(None, (other, other.queued))

    def synchronize(self) -> None:
        self.simulator.host_waits("stream")
        self.run_until(self.queued)

    def __enter__(self) -> "Stream":
        self._outer.append(self.simulator.stream)
        self.simulator.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        self.simulator.stream = self._outer.pop()


class Event:
    """A place in a queue."""

    def __init__(self, simulator: "Simulator") -> None:
        self._simulator = simulator
        self.place: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._simulator.stream
        self.place = (stream, stream.queued)

    def synchronize(self) -> None:
        if self.place is not None:
            if self.place[0].done < self.place[1]:
                self._simulator.host_waits("event")
            self.place[0].run_until(self.place[1])


class Simulator:
    """The device.

    policy: when queued work runs; one of POLICIES. total: bytes of its memory. limits: what was set in turn.
    waits: how often the host waited, by line of the package and what for.
    live, reserved, peak_live, peak_reserved: bytes of the caching allocator.
    """

    def __init__(self, policy: str, seed: int = 0, total: int = 1 << 33) -> None:
        self.policy, self.total, self.limit = policy, total, total
        self.limits: list[int] = []
        self.lock, self._random, self._local = threading.RLock(), random.Random(seed), threading.local()
        self._default = Stream(self)
        self._pool, self._turn = [Stream(self) for _ in range(_STREAMS)], 0
        self.waits: Counter[tuple[str, str]] = Counter()
        self.live = self.reserved = self.peak_live = self.peak_reserved = 0
        self._cached: dict[Stream, list[torch.Tensor]] = defaultdict(list)
        self._last_use: dict[int, int] = {}
        self.locked: dict[int, int] = {}  # bytes of page-locked memory, by address
        self.kept: list[torch.Tensor] = []  # page-locked memory that torch keeps

    # --- queues ---

    @property
    def stream(self) -> Stream:
        return getattr(self._local, "stream", self._default)

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self._local.stream = stream

    def new_stream(self, device: object = None) -> Stream:
        self._turn += 1
        return self._pool[self._turn % _STREAMS]

    def schedule(self) -> None:
        """Run as much of what is queued as the policy wants to run now."""
        if self.policy == "eager":
            for stream in (self._default, *self._pool):
                stream.run_until(stream.queued)
        elif self.policy == "copies first":
            while any(stream.step() for stream in self._pool):
                pass
        elif self.policy == "computations first":
            while self._default.step():
                pass
        elif self.policy == "random":
            for _ in range(self._random.choice((0, 0, 0, 1, 2, 8))):
                self._random.choice((self._default, *self._pool)).step()

    def synchronize(self, device: object = None) -> None:
        self.host_waits("device")
        self._run_all()

    def _run_all(self) -> None:
        for stream in (self._default, *self._pool):
            stream.run_until(stream.queued)

    def host_waits(self, what: str) -> None:
        """Count a wait of the thread that queues computations; those that read and write may wait."""
        if threading.current_thread() is not threading.main_thread():
            return
        frame = sys._getframe(1)
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        name = frame.f_code.co_filename
        place = f"{name.removeprefix(PACKAGE)}:{frame.f_code.co_name}" if name.startswith(PACKAGE) else "elsewhere"
        self.waits[place, what] += 1

    def wait_for_values(self, what: str) -> None:
        """Have the host wait for the current stream."""
        self.host_waits(what)
        self.stream.run_until(self.stream.queued)

    # --- memory ---

    def allocate(self, nbytes: int) -> "Memory":
        """Memory for the current stream, from its cache if a block there is large enough."""
        size, stream = max(_GRANULE, -(-nbytes // _GRANULE) * _GRANULE), self.stream
        with self.lock:
            block = self._reused(size, stream)
            block = self._new(size) if block is None else block
            self.live += block.nbytes
            self.peak_live = max(self.peak_live, self.live)
            if stream.done < self._last_use.get(_address(block), 0):  # earlier work on the same stream may still use it
                stream.push(lambda: block.fill_(255))
            else:
                run(lambda: block.fill_(255))
        return Memory(self, block, stream)

    def _reused(self, size: int, stream: Stream) -> torch.Tensor | None:
        blocks = self._cached[stream]
        found = min((i for i, b in enumerate(blocks) if b.nbytes >= size), key=lambda i: blocks[i].nbytes, default=None)
        if found is None:
            return None
        block = blocks.pop(found)
        if block.nbytes > size:
            blocks.append(plain(lambda: block[size:]))
        return plain(lambda: block[:size])

    def _new(self, size: int) -> torch.Tensor:
        if self.reserved + size > self.limit:
            self.empty_cache()
        if self.reserved + size > self.limit:
            raise torch.OutOfMemoryError(f"simulated: {size} bytes beside {self.reserved} of {self.limit}")
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return plain(lambda: torch.empty(size, dtype=torch.uint8))

    def give_back(self, block: torch.Tensor, stream: Stream) -> None:
        with self.lock:
            self.live -= block.nbytes
            self._cached[stream].append(block)
            self._last_use[_address(block)] = max(stream.queued, self._last_use.get(_address(block), 0))

    def empty_cache(self) -> None:
        """Free what is cached, for which a device waits until its work is done."""
        with self.lock:
            self._run_all()
            self.reserved -= sum(block.nbytes for blocks in self._cached.values() for block in blocks)
            self._cached.clear()

    def reset_peaks(self, device: object = None) -> None:
        self.peak_live, self.peak_reserved = self.live, self.reserved

    def set_fraction(self, fraction: float, device: object = None) -> None:
        self.limit = int(fraction * self.total)
        self.limits.append(self.limit)

    # --- page-locked host memory ---

    def lock_pages(self, address: int, nbytes: int, _flags: int) -> int:
        self.locked[address] = nbytes
        return 0

    def unlock_pages(self, address: int) -> int:
        self._require_no_copies()
        return 0 if self.locked.pop(address, None) is not None else 713  # cudaErrorHostMemoryNotRegistered

    def _require_no_copies(self) -> None:
        """A copy that is still queued would use memory that is no longer locked."""
        for stream in (self._default, *self._pool):
            if stream.done < stream.queued:
                self.host_waits("unlocking")
                stream.run_until(stream.queued)

    def is_locked(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        return any(first <= address < first + nbytes for first, nbytes in self.locked.items())


class Memory:
    """A block of the device's memory, given back to its stream's cache when the last tensor in it is gone."""

    def __init__(self, simulator: Simulator, block: torch.Tensor, stream: Stream) -> None:
        self.simulator, self.block, self._stream = simulator, block, stream

    def __del__(self) -> None:
        self.simulator.give_back(self.block, self._stream)


def run(operation: Operation) -> None:
    with _disable_current_modes(), torch.inference_mode():
        operation()


def plain(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor made in host memory, whatever is being simulated."""
    with _disable_current_modes(), torch.inference_mode():
        return make()


def _address(block: torch.Tensor) -> int:
    return block.untyped_storage().data_ptr()


@contextmanager
def simulated(policy: str = "lazy", seed: int = 0, total: int = 1 << 33) -> Iterator[Simulator]:
    """Have torch find one CUDA device, which is simulated, in the block."""
    from simulated_tensor import Dispatch, tensors_made_on_host  # after this module, which it imports

    simulator = Simulator(policy, seed, total)
    with pytest.MonkeyPatch.context() as patch, tensors_made_on_host(patch, simulator), Dispatch(simulator):
        _replace_torch(patch, simulator)
        try:
            yield simulator
        finally:
            device._KINDS[DEVICE.type].end(DEVICE)  # what a stage that was not ended has left


def _replace_torch(patch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    patch.setattr(_HOOKS, "in_use", True)
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (simulator.total - simulator.reserved, simulator.total),
        "memory_reserved": lambda device=None: simulator.reserved,
        "max_memory_reserved": lambda device=None: simulator.peak_reserved,
        "max_memory_allocated": lambda device=None: simulator.peak_live,
        "reset_peak_memory_stats": simulator.reset_peaks,
        "empty_cache": simulator.empty_cache,
        "get_per_process_memory_fraction": lambda device=None: simulator.limit / simulator.total,
        "set_per_process_memory_fraction": simulator.set_fraction,
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="simulated",
            uuid=os.environ.get("RANK", "0"),  # each rank has its own
        ),
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=simulator.lock_pages, cudaHostUnregister=simulator.unlock_pages
        ),
        "check_error": _require_success,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    patch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda settings: None)
    patch.setattr(torch, "Stream", simulator.new_stream)
    patch.setattr(torch, "Event", lambda device=None: Event(simulator))
    patch.setattr(torch.accelerator, "current_stream", lambda device=None: simulator.stream)
    patch.setattr(torch.accelerator, "synchronize", simulator.synchronize)


def _require_success(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")
