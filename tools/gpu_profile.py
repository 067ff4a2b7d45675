"""Where a collection's time goes, and which lines wait for the device; two stages of `gpu_check.py`."""

import collections
import cProfile
import io
import pstats
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import flap_stream
from flap_stream.config import CollectConfig


@dataclass(frozen=True)
class Collection:
    """A collection to look at. place: a directory for its runs."""

    model: Path
    tokens: Path
    place: Path
    device: str

    def run(self, name: str) -> None:
        """Collect once."""
        options = CollectConfig(calibration=(str(self.tokens),), device=self.device)
        flap_stream.collect(self.model, self.place / name, options)


def profile(job: Collection, out: Path) -> dict[str, float]:
    """Write where the main thread's time and the device's go to a file; returns the seconds of both runs."""
    main_thread, text = cProfile.Profile(), io.StringIO()
    seconds = dict[str, float]()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    kernels = torch.profiler.profile(activities=activities)
    for run, profiler in (("main thread", main_thread), ("kernels", kernels)):
        began = time.monotonic()
        with profiler:
            job.run(f"profile {run}")
        seconds[run] = time.monotonic() - began
    for order in ("cumulative", "tottime"):
        pstats.Stats(main_thread, stream=text).sort_stats(order).print_stats(45)
    averages = kernels.key_averages()
    for key in ("self_cpu_time_total", *(["self_device_time_total"] if job.device != "cpu" else [])):
        text.write(averages.table(sort_by=key, row_limit=25, max_name_column_width=70))
    out.write_text(text.getvalue())
    return seconds


def waits(job: Collection) -> dict[str, int]:
    """Lines that wait for the device, and how often."""
    lines: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if "/flap_stream/" in f.filename]
            lines[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job.run("waits")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(lines.most_common())
