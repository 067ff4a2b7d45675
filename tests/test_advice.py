"""A job that is refused is told what would run, and that runs: whatever the model, the limits and the wishes."""

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from models import tiny_config

from flap_stream.config import REFITS, EngineConfig
from flap_stream.engine.memory import Limits
from flap_stream.engine.placement import Job
from flap_stream.engine.placement.candidates import candidates
from flap_stream.engine.placement.choice import place
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InsufficientMemory
from flap_stream.model.checkpoint import describe
from flap_stream.model.skeleton import Skeleton
from flap_stream.restore.requirements import refit_sizes

pytestmark = pytest.mark.slow

MIB = 1 << 20
BASE = 400 * MIB
SIZES = ((64, 96, 2), (256, 1024, 3), (512, 4096, 2))


@lru_cache
def jobs(sizes: tuple[int, int, int], tokens: int, target: str | None, device: str, tmp: str) -> list[Job]:
    """The collection of a model of these sizes, and its refit if there is one; no weights are needed."""
    hidden, neurons, layers = sizes
    config = tiny_config(hidden_size=hidden, intermediate_size=neurons, layers=layers, vocab_size=5000).to_dict()
    with describe(
        "model", Path(tmp), json.loads(json.dumps(config)), Skeleton(config, "model").tensors(), "float32"
    ) as made:
        model = StreamedModel(made, EngineConfig(device="cpu"))
        first = replace(model.job(1, tokens), device=device, base_bytes=BASE)
        then = [] if target is None else [model.refit_after(first, refit_sizes(model, target, tokens))]
    return [first, *then]


def followed(advice: str, limits: Limits, batch_size: int | None, prefetch: int | None) -> tuple[Any, ...]:
    """Limits and wishes, and tokens in a window if it names them, after one way that a refusal names."""
    for option, value in re.findall(r"--([a-z-]+) (\d+)", advice):
        match option:
            case "host-memory" | "device-memory":
                limits = replace(limits, **{option.removesuffix("-memory"): int(value) * MIB})
            case "batch-size":
                batch_size = int(value)
            case "prefetch":
                prefetch = int(value)
    tokens = re.search(r"--sequence-length (\d+)", advice)
    return limits, batch_size, prefetch, tokens and int(tokens[1])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.sampled_from(SIZES),
    tokens=st.sampled_from((32, 200)),
    samples=st.integers(1, 4096),
    target=st.sampled_from((None, *REFITS)),
    device=st.sampled_from(("cpu", "cuda")),
    batch_size=st.one_of(st.none(), st.integers(1, 64)),
    prefetch=st.sampled_from((None, 0, 1)),
    is_recorded=st.booleans(),
    host=st.floats(0, 1.1),
    on_device=st.floats(0, 1.1),
    drift=st.integers(0, 7 * MIB),
)
def test_what_a_refusal_advises_is_not_refused(
    sizes: Any,
    tokens: Any,
    samples: Any,
    target: Any,
    device: Any,
    batch_size: Any,
    prefetch: Any,
    is_recorded: Any,
    host: Any,
    on_device: Any,
    drift: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = jobs(sizes, tokens, target, device, str(tmp_path_factory.getbasetemp()))
    first, *then = (replace(job, samples=samples) for job in made)
    recorded = batch_size if is_recorded else None
    wish = None if is_recorded else batch_size
    needs = [p for job in (first, *then) for p in candidates(job, batch_size, prefetch)]
    most = max(p.host_bytes for p in needs), max(p.device_bytes for p in needs)
    limits = Limits(int(BASE * 0.9 + host * (most[0] - BASE * 0.9)), int(on_device * most[1]))
    try:
        place(first, limits, wish, prefetch, then, recorded)
    except InsufficientMemory as refusal:
        ways = str(refusal).partition("it would run with ")[2].split(", or ")
    else:
        assume(False)
    event(f"{len(ways)} ways")
    for way in ways:
        within, batch, ahead, length = followed(way, limits, wish, prefetch)
        assert (within, batch, ahead, length) != (limits, wish, prefetch, None), f"{way!r} says nothing to do"
        assert recorded is None or batch is None, "a run that is taken up has its batch size for good"
        again = [replace(job, base_bytes=BASE + drift) for job in (first, *then)]
        if length is not None:
            again = [replace(job, tokens=length) for job in again]
        placement = place(again[0], within, batch, ahead, again[1:], recorded)
        # The refit is placed on its own later, at that batch size and on the same base.
        for job in again[1:]:
            place(job, within, None, ahead, recorded=placement.batch_size)


def test_both_memories_are_named_as_one_way(tmp_path_factory: pytest.TempPathFactory) -> None:
    (job,) = jobs(SIZES[0], 32, None, "cuda", str(tmp_path_factory.getbasetemp()))
    with pytest.raises(InsufficientMemory, match=r"with --host-memory \d+MiB --device-memory \d+MiB, if there is"):
        place(job, Limits(MIB, MIB))
