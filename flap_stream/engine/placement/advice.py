"""What to say when a job does not fit: how much is lacking, and which settings would fit."""

from collections.abc import Sequence
from dataclasses import replace

from flap_stream.engine.memory import Limits
from flap_stream.engine.placement.candidates import fastest_fitting, last_resort, smallest
from flap_stream.engine.placement.job import Job
from flap_stream.progress import format_bytes

# How much the predictions of two processes for the same job may differ; not measured.
_BETWEEN_PROCESSES = 8 << 20
_FEWEST_TOKENS = 16  # shorter windows are not suggested


def refusal(
    jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None, recorded: int | None
) -> str:
    """What is lacking and how to solve it: any one of the ways named is enough."""
    least = smallest(jobs, limits, batch_size or recorded, prefetch)
    found, more = [], []
    for name, need, limit in (
        ("host", least.host_bytes, limits.host),
        ("device", least.device_bytes, limits.device),
    ):
        if need > limit:
            found.append(f"{format_bytes(need)} of {name} memory, but {format_bytes(limit)} may be used")
            more.append(f"--{name}-memory {-(-(need + _BETWEEN_PROCESSES) >> 20)}MiB")
    ways = [" ".join(more) + ", if there is that much"]
    other = _other_settings(jobs, limits, batch_size, prefetch, recorded)
    if other is None and recorded is None:  # shorter windows would be another run
        other = _shorter_windows(jobs, limits, batch_size, prefetch)
    ways += [] if other is None else [other]
    return f"this job needs at least {' and '.join(found)}; it would run with {', or '.join(ways)}"


def _with_less_margin(limits: Limits) -> Limits:
    """The limits less a margin, within which suggested settings must fit: another process will use them."""
    return replace(limits, host=limits.host - _BETWEEN_PROCESSES)


def _other_settings(
    jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None, recorded: int | None
) -> str | None:
    """Options instead of the requested ones with which the jobs fit."""
    kept = batch_size or recorded  # a resumed run cannot change its batch size
    for other_batch_size, other_prefetch in ((None, prefetch), (kept, None), (None, None)):
        if other_batch_size is None and recorded is not None:
            continue
        freer = fastest_fitting(jobs, _with_less_margin(limits), other_batch_size, other_prefetch)
        if freer is not None:
            changes = [f"--batch-size {freer.batch_size}"] if freer.batch_size != kept else []
            changes += (
                [f"--prefetch {freer.prefetch}"] if freer.prefetch != (1 if prefetch is None else prefetch) else []
            )
            return " ".join(changes) or None
    return None


def _shorter_windows(jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None) -> str | None:
    """The longest windows, found by halving, with which the jobs fit at the requested settings."""
    tokens = jobs[0].tokens // 2
    while tokens >= _FEWEST_TOKENS:
        shorter = [replace(job, tokens=tokens) for job in jobs]
        if all(placement.fits(_with_less_margin(limits)) for placement in last_resort(shorter, batch_size, prefetch)):
            return f"windows of {tokens} tokens (--sequence-length {tokens})"
        tokens //= 2
    return None
