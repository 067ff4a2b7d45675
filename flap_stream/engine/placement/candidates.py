"""The ways in which a job can be run, from the fastest to the one that takes the least memory."""

from collections.abc import Iterator, Sequence

from flap_stream.engine.memory import Limits
from flap_stream.engine.placement.job import Job
from flap_stream.engine.placement.prediction import Placement, predict

# Default tokens per batch: enough to keep matrix products efficient with little workspace.
_BATCH_TOKENS = (1024, 16384)  # on a CPU, on an accelerator
# With fewer, products wait for weights from memory; better to keep hidden states on disk or give up reading ahead.
_EFFICIENT_TOKENS = (512, 4096)  # on a CPU, on an accelerator


def fastest_fitting(
    jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None
) -> Placement | None:
    """The fastest placement of the first job at whose batch size, or a smaller one if it may be, all of them fit."""
    for first in candidates(jobs[0], batch_size, prefetch):
        if first.fits(limits) and all(
            any(placement.fits(limits) for placement in candidates(job, first.batch_size, prefetch)) for job in jobs[1:]
        ):
            return first
    return None


def smallest(jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None) -> Placement:
    """The placement of the first job at the batch size with the least memory over all jobs, with that memory.

    Exceeding the device limit counts first, then host memory."""

    def excess(placement: Placement) -> tuple[int, int]:
        return max(0, placement.device_bytes - limits.device), placement.host_bytes

    found = []
    for placement in candidates(jobs[0], batch_size, prefetch):
        for job in jobs[1:]:
            placement = placement.together(min(candidates(job, placement.batch_size, prefetch), key=excess))
        found.append(placement)
    return min(found, key=excess)


def last_resort(jobs: Sequence[Job], batch_size: int | None, prefetch: int | None) -> Iterator[Placement]:
    """Each job in the smallest batches, with everything on disk that can be: if these fit, a placement can be found."""
    sizes, places, prefetches = _settings(jobs[0], batch_size, prefetch)
    for job in jobs:
        yield predict(job, sizes[-1], places[-1], prefetches[-1])


def candidates(job: Job, batch_size: int | None, prefetch: int | None) -> Iterator[Placement]:
    """Placements from the fastest to the smallest. batch_size, prefetch: requested; None leaves them open."""
    sizes, places, prefetches = _settings(job, batch_size, prefetch)
    efficient = [size for size in sizes if size * job.tokens >= _EFFICIENT_TOKENS[job.device != "cpu"]] or sizes[:1]
    for group in (efficient, sizes[len(efficient) :]):
        for ahead in prefetches:
            for hidden_place in places:
                for size in group:
                    yield predict(job, size, hidden_place, ahead)


def _settings(
    job: Job, batch_size: int | None, prefetch: int | None
) -> tuple[Sequence[int], Sequence[str], Sequence[int]]:
    """Batch sizes, places of the hidden states and layers to read ahead, each from the fastest to the smallest."""
    places = ("host", "disk") if job.device == "cpu" else ("device", "host", "disk")
    prefetches = (1, 0) if prefetch is None else (prefetch,)
    if batch_size is not None and job.keeps_batch_size:
        return [min(batch_size, job.samples)], places, prefetches
    wanted = min(job.samples, batch_size or max(1, _BATCH_TOKENS[job.device != "cpu"] // job.tokens))
    return [max(1, wanted >> shift) for shift in range(wanted.bit_length())], places, prefetches
