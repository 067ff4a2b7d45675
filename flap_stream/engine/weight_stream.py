"""The stream of weights: one decoder layer after another from disk into reused buffers on the device.

On a CPU a layer is read straight into the buffer that it is used from. For CUDA it is read block by block into a ring
of page-locked host buffers and copied from there on a stream of its own; nothing is reused before its event.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count

import torch

from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.safetensors_format import FORWARD_DTYPES, TensorEntry
from flap_stream.model.shard_files import Block, coalesce

RING_BLOCK_BYTES = 1 << 24

_ALIGNMENT = 64


def ring_blocks(readers: int) -> int:
    """Blocks of the ring that `readers` ranks of a node share: each reads one while the same number is copied."""
    return 2 * max(2, readers)


def slab_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a buffer that holds tensors of these sizes, each of them aligned."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def load(
    checkpoint: Checkpoint,
    entries: Mapping[str, TensorEntry],
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> dict[str, torch.Tensor]:
    """Tensors by the names given, on the device; read once a node."""
    slab = ranks.node_buffer(slab_bytes([entry.nbytes for entry in entries.values()]))
    _read(checkpoint, entries, slab, ranks)
    return {name: tensor.to(device, dtype) for name, tensor in _views(entries, slab).items()}


def stream_layers(
    checkpoint: Checkpoint,
    layers: Sequence[Mapping[str, TensorEntry]],
    device: torch.device,
    dtype: torch.dtype,
    prefetch: int,
    ranks: Ranks = ALONE,
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each layer, by relative name, in the forward's dtype on the device.

    They are views of reused buffers, valid until the next step. Each is read once a node, by all its ranks together; on
    a CPU they share the buffers too, so what one changes there, all do.
    prefetch: layers that are read ahead while one is in use; each needs a buffer of its own.
    """
    if not layers:
        return
    size = max(slab_bytes([entry.nbytes for entry in entries.values()]) for entries in layers)
    slots = min(prefetch + 1, len(layers))
    loader = (
        _CudaLoader(checkpoint, device, size, slots, ranks)
        if device.type == "cuda"
        else _HostLoader(checkpoint, size, slots, ranks)
    )
    cast = _Cast(layers, device, dtype)
    with closing(loader), ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        ahead = [reader.submit(loader.fill, i, layers[i]) for i in range(min(prefetch, len(layers)))]
        for i, entries in enumerate(layers):
            if i + prefetch < len(layers):
                ahead.append(reader.submit(loader.fill, i + prefetch, layers[i + prefetch]))
            ahead.pop(0).result()
            yield cast(_views(entries, loader.take(i)))
            loader.give_back(i)


class _Cast:
    """Brings a layer's tensors into the forward's dtype, in a buffer of its own if any has another."""

    def __init__(self, layers: Sequence[Mapping[str, TensorEntry]], device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        sizes = [cast_bytes(entries.values(), dtype) for entries in layers]
        self._slab = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result, at = {}, 0
        for name, tensor in tensors.items():
            if tensor.dtype == self._dtype:
                result[name] = tensor
                continue
            nbytes = tensor.numel() * self._dtype.itemsize
            result[name] = self._slab[at : at + nbytes].view(self._dtype).view(tensor.shape).copy_(tensor)
            at += slab_bytes([nbytes])
        return result


def cast_bytes(entries: Iterable[TensorEntry], dtype: torch.dtype) -> int:
    """Bytes of a buffer that holds those tensors in the forward's dtype that have another."""
    others = [entry for entry in entries if getattr(torch, FORWARD_DTYPES[entry.dtype]) != dtype]
    return slab_bytes([entry.nbytes // entry.item_bytes * dtype.itemsize for entry in others])


class _HostLoader:
    """Buffers in host memory, the node's, read into directly."""

    def __init__(self, checkpoint: Checkpoint, size: int, slots: int, ranks: Ranks) -> None:
        self._checkpoint, self._ranks = checkpoint, ranks
        self._slabs = [ranks.node_buffer(size) for _ in range(slots)]

    def fill(self, index: int, entries: Mapping[str, TensorEntry]) -> None:
        """Read a layer into its buffer."""
        _read(self._checkpoint, entries, self.take(index), self._ranks)

    def take(self, index: int) -> torch.Tensor:
        """The buffer of a layer."""
        return self._slabs[index % len(self._slabs)]

    def give_back(self, index: int) -> None:
        """The layer is no longer in use."""

    def close(self) -> None:
        """Nothing to let go of but memory."""


class _CudaLoader:
    """Buffers in device memory, filled on a stream of its own from a page-locked ring, the node's.

    The ranks of a node read one block each, wait for each other, and copy all of them; meanwhile the ring's other half
    is read. Disks are slower than the way to any device, so nothing would come of passing weights between devices.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, size: int, slots: int, ranks: Ranks) -> None:
        self._checkpoint, self._device, self._ranks = checkpoint, device, ranks
        self._slabs = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        # One allocation, pinned once: pin_memory per tensor rounds up to a power of two and costs.
        blocks = ring_blocks(ranks.local[1])
        self._is_shared = ranks.local[1] > 1
        if self._is_shared:
            memory = ranks.node_buffer(blocks * RING_BLOCK_BYTES)
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
        else:
            memory = torch.empty(blocks * RING_BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        self._ring = memory.view(blocks, RING_BLOCK_BYTES)
        self._copies = torch.cuda.Stream(device)
        self._block_copied = [torch.cuda.Event() for _ in range(blocks)]
        self._filled = [torch.cuda.Event() for _ in range(slots)]
        self._free = [torch.cuda.Event() for _ in range(slots)]
        self._turns = count()
        # torch may give memory that kernels launched before still use: only its own stream would come after them.
        self._copies.wait_stream(torch.cuda.current_stream(device))

    @torch.inference_mode()  # a thread's own: without it, what was made under one cannot be written to
    def fill(self, index: int, entries: Mapping[str, TensorEntry]) -> None:
        """Read a layer and copy it to its buffer, as soon as the layer that used the buffer is done with it."""
        slot = index % len(self._slabs)
        self._copies.wait_event(self._free[slot])
        blocks = coalesce(list(entries.values()), RING_BLOCK_BYTES)
        (own, readers), offsets = self._ranks.local, _offsets(entries)
        for first in range(0, len(blocks), readers):
            turns = [(next(self._turns) % len(self._ring), block) for block in blocks[first : first + readers]]
            for turn, _ in turns:
                self._block_copied[turn].synchronize()
            self._ranks.node_barrier()  # no rank copies from there any more
            for turn, block in turns[own : own + 1]:
                self._checkpoint.read_block(block, [memoryview(self._ring[turn, : block.nbytes].numpy())])
            self._ranks.node_barrier()
            for turn, block in turns:
                self._copy(block, self._ring[turn], self._slabs[slot], offsets)
                self._block_copied[turn].record(self._copies)
        self._filled[slot].record(self._copies)

    def _copy(self, block: Block, source: torch.Tensor, target: torch.Tensor, offsets: Mapping[str, int]) -> None:
        at = 0
        with torch.cuda.stream(self._copies):
            for entry, start, stop in block.parts:
                offset = offsets[entry.name] + start
                part = source[at : at + stop - start]
                if self._ranks.leads_node:
                    self._checkpoint.note_checksum(entry, start, memoryview(part.numpy()))
                target[offset : offset + stop - start].copy_(part, non_blocking=True)
                at += stop - start

    def take(self, index: int) -> torch.Tensor:
        """The buffer of a layer; what is computed from now on waits until it is filled."""
        slot = index % len(self._slabs)
        torch.cuda.current_stream(self._device).wait_event(self._filled[slot])
        return self._slabs[slot]

    def give_back(self, index: int) -> None:
        """What was launched so far is the last that uses the layer."""
        self._free[index % len(self._slabs)].record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Wait for what is being copied and let go of the ring."""
        self._copies.synchronize()
        if self._is_shared:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._ring.data_ptr())))


def _offsets(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Full tensor name to its place in a buffer."""
    offsets, at = {}, 0
    for entry in entries.values():
        offsets[entry.name] = at
        at += slab_bytes([entry.nbytes])
    return offsets


def _views(entries: Mapping[str, TensorEntry], slab: torch.Tensor) -> dict[str, torch.Tensor]:
    offsets, tensors = _offsets(entries), {}
    for name, entry in entries.items():
        at, dtype = offsets[entry.name], getattr(torch, FORWARD_DTYPES[entry.dtype])
        tensors[name] = slab[at : at + entry.nbytes].view(dtype).view(entry.shape)
    return tensors


def _read(checkpoint: Checkpoint, entries: Mapping[str, TensorEntry], slab: torch.Tensor, ranks: Ranks) -> None:
    """Read tensors into a host buffer that the ranks of a node share, each of them a part."""
    raw, offsets = memoryview(slab.numpy()), _offsets(entries)
    requests = [(entry, raw[offsets[entry.name] : offsets[entry.name] + entry.nbytes]) for entry in entries.values()]
    ranks.node_barrier()  # all are done with what is in the buffer
    checkpoint.read_all(requests, ranks.local)
    ranks.node_barrier()
    if ranks.leads_node:
        checkpoint.note_checksums(requests)
