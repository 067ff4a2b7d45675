"""Streaming weights: one decoder layer after another is read from disk into reused buffers on the device.

On a CPU a layer is read straight into the buffer that it is used from. For an accelerator it is read block by block
into a ring of page-locked host buffers and copied from there on a separate stream; nothing is reused before its event.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from math import prod

import torch

from flap_stream.engine.device import current_stream, lock_pages, new_event, new_stream, unlock_pages
from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.engine.shared_memory import node_buffer
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.decoding import WORKSPACE_BYTES, decode
from flap_stream.model.dtypes import raw_view, stored_dtype
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.model.shard_files import Block, coalesce

RING_BLOCK_BYTES = 1 << 24  # not measured

_ALIGNMENT = 64  # bytes, for vector loads
_READS_IN_FLIGHT = 4  # of a rank that is alone on its node; a disk reads one block at a time far below its rate


def ring_blocks(readers: int) -> int:
    """Number of blocks in the ring that `readers` ranks of a node share.

    A rank alone has `_READS_IN_FLIGHT` reads in flight, and as many blocks on their way to the device; several ranks
    fill one each while as many are copied.
    """
    return 2 * (_READS_IN_FLIGHT if readers == 1 else readers)


Dtypes = Callable[[str], torch.dtype]  # from a tensor's relative name to the dtype that it runs in


def slab_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a buffer that holds tensors of these sizes, each aligned."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def stored_slab_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Bytes of a buffer that holds tensors as they are stored."""
    return slab_bytes([part.nbytes for entry in entries.values() for part in entry.stored])


def load(
    checkpoint: Checkpoint,
    entries: Mapping[str, TensorEntry],
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> dict[str, torch.Tensor]:
    """Load tensors to the device, by the names given; each is read once per node."""
    slab = node_buffer(ranks, stored_slab_bytes(entries))
    requests = _read(checkpoint, entries, slab, ranks)
    if ranks.leads_node:
        checkpoint.note_checksums(requests)
    return {name: _loaded(entries[name], stored, device, dtype) for name, stored in _views(entries, slab).items()}


def _loaded(
    entry: TensorEntry, stored: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    if entry.encoding is None:
        return stored[0].to(device, dtype)
    result = torch.empty(entry.shape, dtype=dtype, device=device)
    decode(entry.encoding, [part.to(device) for part in stored], result)
    return result


@contextmanager
def stream_layers(
    checkpoint: Checkpoint,
    layers: Sequence[Mapping[str, TensorEntry]],
    device: torch.device,
    dtypes: Dtypes,
    prefetch: int,
    ranks: Ranks = ALONE,
) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
    """Read layers in the block, from its beginning on; yields an iterator over them.

    It yields the tensors of each layer, by relative name, in the dtypes of these names, on the device. They are views
    of reused buffers, valid until the next layer. Each is read once per node, by all its ranks together; on a CPU the
    ranks share the buffers too, so changes made by one are seen by all.
    prefetch: layers that are read ahead while one is in use; each needs its own buffer.
    """
    if not layers:
        yield iter(())
        return
    size = max(map(stored_slab_bytes, layers))
    slots = min(prefetch + 1, len(layers))
    cast = _Cast(layers, device, dtypes)
    loader = (
        _HostLoader(checkpoint, size, slots, ranks)
        if device.type == "cpu"
        else _DeviceLoader(checkpoint, device, size, slots, ranks)
    )
    with closing(loader), ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        ahead = [reader.submit(loader.fill, i, layers[i]) for i in range(min(prefetch, len(layers)))]

        def taken() -> Iterator[dict[str, torch.Tensor]]:
            for i, entries in enumerate(layers):
                if i + prefetch < len(layers):
                    ahead.append(reader.submit(loader.fill, i + prefetch, layers[i + prefetch]))
                ahead.pop(0).result()
                yield cast(entries, _views(entries, loader.take(i)))
                loader.give_back(i)

        yield taken()


class _Cast:
    """Makes a layer's tensors in the dtypes they run in, in a buffer of its own for those that are stored otherwise."""

    def __init__(self, layers: Sequence[Mapping[str, TensorEntry]], device: torch.device, dtypes: Dtypes) -> None:
        self._dtypes = dtypes
        sizes = [cast_bytes(entries, dtypes) for entries in layers]
        self._slab = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def __call__(
        self, entries: Mapping[str, TensorEntry], tensors: Mapping[str, Sequence[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        result, at = {}, 0
        for name, stored in tensors.items():
            entry, dtype = entries[name], self._dtypes(name)
            if not _is_converted(entry, dtype):
                result[name] = stored[0]
                continue
            nbytes = prod(entry.shape) * dtype.itemsize
            result[name] = self._slab[at : at + nbytes].view(dtype).view(entry.shape)
            if entry.encoding is None:
                result[name].copy_(stored[0])
            else:
                decode(entry.encoding, stored, result[name])
            at += slab_bytes([nbytes])
        return result


def _is_converted(entry: TensorEntry, dtype: torch.dtype) -> bool:
    return entry.encoding is not None or stored_dtype(entry) != dtype


def cast_bytes(entries: Mapping[str, TensorEntry], dtypes: Dtypes) -> int:
    """Bytes of a buffer for those tensors, converted to the dtypes they run in, that are stored otherwise."""
    wanted = [(entry, dtypes(name)) for name, entry in entries.items()]
    return slab_bytes([prod(entry.shape) * dtype.itemsize for entry, dtype in wanted if _is_converted(entry, dtype)])


def decoding_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Most bytes that decoding these tensors takes beside them."""
    return WORKSPACE_BYTES if any(entry.encoding is not None for entry in entries.values()) else 0


class _HostLoader:
    """Host buffers shared by the node, which layers are read into directly."""

    def __init__(self, checkpoint: Checkpoint, size: int, slots: int, ranks: Ranks) -> None:
        self._checkpoint, self._ranks = checkpoint, ranks
        self._slabs = [node_buffer(ranks, size) for _ in range(slots)]
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="checksum")  # while the next layer is read
        self._checked: list[Future[None] | None] = [None] * slots

    def fill(self, index: int, entries: Mapping[str, TensorEntry]) -> None:
        """Read a layer into its buffer."""
        slot = index % len(self._slabs)
        requests = _read(self._checkpoint, entries, self._slabs[slot], self._ranks)
        if self._ranks.leads_node:
            self._checked[slot] = self._checks.submit(self._checkpoint.note_checksums, requests)

    def take(self, index: int) -> torch.Tensor:
        """The buffer that holds a layer, once its checksum has been taken: its user may change it."""
        slot = index % len(self._slabs)
        checked = self._checked[slot]
        if checked is not None:
            checked.result()
        return self._slabs[slot]

    def give_back(self, index: int) -> None:
        """Do nothing: buffers are reused in order."""

    def close(self) -> None:
        """End the thread; memory is freed with the buffers."""
        self._checks.shutdown()


class _DeviceLoader:
    """Device buffers, filled on a separate stream from a page-locked ring of host blocks shared by the node.

    The ranks of a node read one block each, wait for each other, and copy all of them, while the ring's other half is
    being read. Disks are slower than the link to any device, so passing weights between devices would gain nothing.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, size: int, slots: int, ranks: Ranks) -> None:
        self._checkpoint, self._device, self._ranks = checkpoint, device, ranks
        self._slabs = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        blocks = ring_blocks(ranks.local[1])
        memory = node_buffer(ranks, blocks * RING_BLOCK_BYTES)
        lock_pages(device, memory)
        self._ring = memory.view(blocks, RING_BLOCK_BYTES)
        self._block_copied = [new_event(device) for _ in range(blocks)]
        self._filled = [new_event(device) for _ in range(slots)]
        self._free = [new_event(device) for _ in range(slots)]
        self._turns = count()
        self._reads = ThreadPoolExecutor(_READS_IN_FLIGHT, thread_name_prefix="pread")
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="checksum")  # which need the blocks in order
        self._checked: list[Future[None] | None] = [None] * blocks
        self._copies = new_stream(device)  # after the buffers, whose memory earlier kernels may still use

    @torch.inference_mode()  # set per thread; without it, tensors created in inference mode cannot be written to
    def fill(self, index: int, entries: Mapping[str, TensorEntry]) -> None:
        """Read a layer and copy it to its buffer, once the layer that used the buffer before has finished."""
        slot = index % len(self._slabs)
        self._copies.wait_event(self._free[slot])
        blocks = coalesce([part for entry in entries.values() for part in entry.stored], RING_BLOCK_BYTES)
        if self._ranks.local[1] == 1:
            self._fill_alone(blocks, self._slabs[slot], _offsets(entries))
        else:
            self._fill_together(blocks, self._slabs[slot], _offsets(entries))
        for checked in filter(None, self._checked):
            checked.result()
        self._filled[slot].record(self._copies)

    def _fill_alone(self, blocks: Sequence[Block], slab: torch.Tensor, offsets: Mapping[str, int]) -> None:
        """Read with several reads in flight; blocks are copied in order as they arrive."""
        coming: deque[tuple[int, Block, Future[None]]] = deque()

        def pass_on() -> None:
            turn, block, read = coming.popleft()
            read.result()
            self._copy(block, turn, slab, offsets)

        for block in blocks:
            if len(coming) == len(self._ring):  # the next turn's last copy is not queued yet
                pass_on()
            turn = next(self._turns) % len(self._ring)
            coming.append((turn, block, self._reads.submit(self._read, turn, block, self._checked[turn])))
        while coming:
            pass_on()

    def _read(self, turn: int, block: Block, checked: "Future[None] | None") -> None:
        """Read a block, once what was in its place in the ring has been copied and its checksum taken."""
        if checked is not None:
            checked.result()
        self._block_copied[turn].synchronize()
        self._checkpoint.read_block(block, [memoryview(self._ring[turn, : block.nbytes].numpy())])

    def _fill_together(self, blocks: Sequence[Block], slab: torch.Tensor, offsets: Mapping[str, int]) -> None:
        """Read one block each, wait for the other ranks of the node, and copy all of them."""
        own, readers = self._ranks.local
        for first in range(0, len(blocks), readers):
            turns = [(next(self._turns) % len(self._ring), block) for block in blocks[first : first + readers]]
            for turn, _ in turns:
                checked = self._checked[turn]
                if checked is not None:
                    checked.result()
                self._block_copied[turn].synchronize()
            self._ranks.node_barrier()  # no rank copies from these blocks any more
            for turn, block in turns[own : own + 1]:
                self._checkpoint.read_block(block, [memoryview(self._ring[turn, : block.nbytes].numpy())])
            self._ranks.node_barrier()
            for turn, block in turns:
                self._copy(block, turn, slab, offsets)

    @torch.inference_mode()
    def _copy(self, block: Block, turn: int, target: torch.Tensor, offsets: Mapping[str, int]) -> None:
        """Queue the copies of a block, and have its checksum taken."""
        at, source = 0, self._ring[turn]
        with self._copies:
            for entry, start, stop in block.parts:
                offset = offsets[entry.name] + start
                target[offset : offset + stop - start].copy_(source[at : at + stop - start], non_blocking=True)
                at += stop - start
        self._block_copied[turn].record(self._copies)
        if self._ranks.leads_node:
            self._checked[turn] = self._checks.submit(self._check, block, turn)

    def _check(self, block: Block, turn: int) -> None:
        """Add a block to the checksums of its tensors."""
        at, raw = 0, memoryview(self._ring[turn].numpy())
        for entry, start, stop in block.parts:
            self._checkpoint.note_checksum(entry, start, raw[at : at + stop - start])
            at += stop - start

    def take(self, index: int) -> torch.Tensor:
        """The buffer that holds a layer; computations launched from now on wait until it is filled."""
        slot = index % len(self._slabs)
        current_stream(self._device).wait_event(self._filled[slot])
        return self._slabs[slot]

    def give_back(self, index: int) -> None:
        """Mark the computations launched so far as the last to use the layer."""
        self._free[index % len(self._slabs)].record(current_stream(self._device))

    def close(self) -> None:
        """Wait for pending reads and copies, and free the ring."""
        self._reads.shutdown(cancel_futures=True)
        self._checks.shutdown()
        self._copies.synchronize()
        unlock_pages(self._device, self._ring)


def _offsets(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Byte offset of each stored tensor in a buffer, by full name."""
    offsets, at = {}, 0
    for entry in entries.values():
        for part in entry.stored:
            offsets[part.name] = at
            at += slab_bytes([part.nbytes])
    return offsets


def _views(entries: Mapping[str, TensorEntry], slab: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What each tensor is made of, by relative name."""
    offsets, tensors = _offsets(entries), {}
    for name, entry in entries.items():
        places = [(part, offsets[part.name]) for part in entry.stored]
        tensors[name] = [raw_view(slab[at : at + part.nbytes], part) for part, at in places]
    return tensors


def _read(
    checkpoint: Checkpoint, entries: Mapping[str, TensorEntry], slab: torch.Tensor, ranks: Ranks
) -> list[tuple[TensorEntry, memoryview]]:
    """Read tensors as they are stored into a host buffer that the ranks of a node share; each reads a part.

    Returns the stored ones with their places in the buffer.
    """
    raw, offsets = memoryview(slab.numpy()), _offsets(entries)
    stored = [part for entry in entries.values() for part in entry.stored]
    requests = [(part, raw[offsets[part.name] : offsets[part.name] + part.nbytes]) for part in stored]
    ranks.node_barrier()  # no rank uses the buffer's previous contents any more
    checkpoint.read_all(requests, ranks.local)
    ranks.node_barrier()
    return requests
