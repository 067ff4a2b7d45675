"""Choosing the placement of a job."""

from collections.abc import Sequence
from dataclasses import replace

from flap_stream.engine.memory import Limits, resident_bytes
from flap_stream.engine.placement.advice import refusal
from flap_stream.engine.placement.candidates import candidates, fastest_fitting
from flap_stream.engine.placement.job import Job
from flap_stream.engine.placement.prediction import Placement
from flap_stream.errors import InsufficientMemory


def place(
    job: Job,
    limits: Limits,
    batch_size: int | None = None,
    prefetch: int | None = None,
    then: Sequence[Job] = (),
    recorded: int | None = None,
) -> Placement:
    """The fastest placement that fits, at a batch size at which the jobs in `then`, which follow, fit as well.

    batch_size, prefetch: requested; None leaves them open. recorded: the batch size of a run that is resumed, used
    unless another is requested.
    Raises InsufficientMemory, naming settings that would fit, if there is none.
    """
    jobs = _on_one_base((job, *then), batch_size or recorded, prefetch)
    found = fastest_fitting(jobs, limits, batch_size or recorded, prefetch)
    if found is None:
        raise InsufficientMemory(refusal(jobs, limits, batch_size, prefetch, recorded))
    return found


def _on_one_base(jobs: Sequence[Job], batch_size: int | None, prefetch: int | None) -> list[Job]:
    """The jobs, all with the memory resident before the first as their base."""
    base = jobs[0].base_bytes
    if base is None:
        for job in jobs:
            next(candidates(job, batch_size, prefetch))  # finding a workspace loads modules that stay loaded
        base = resident_bytes()
    return [replace(job, base_bytes=base) for job in jobs]
