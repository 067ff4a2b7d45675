"""Several ranks, each a real process with a simulated device of its own: the same bytes as one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import contents, random_tokens, save, save_tokens, tiny_config, tiny_model
from rank_jobs import Prune, launch
from simulated_device import simulated

from flap_stream.config import PruneConfig


class OnSimulatedDevice:
    """An action of a rank, whose device runs its work in an order of its own."""

    def __init__(self, action: Callable[[], None], seed: int) -> None:
        self.action, self.seed = action, seed

    def __call__(self) -> None:
        with simulated("random", 10 * self.seed + int(os.environ.get("RANK", "9"))):
            self.action()


@pytest.mark.parametrize(
    "how",
    [{"metric": "fisher", "loss_windows": 5}, {"restore": "least-squares"}, {"restore": "reconstruct"}],
    ids=["by the loss", "least-squares", "reconstruct"],
)
def test_ranks_with_a_device_each_write_what_one_process_writes(tmp_path: Path, how: dict[str, Any]) -> None:
    model = save(tiny_model(tiny_config()), tmp_path / "model")
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 16))
    options = PruneConfig(ratio=0.3, calibration=(tokens,), samples=9, batch_size=3, device="cuda", **how)
    for ranks in (1, 2):
        place = tmp_path / f"{ranks}"
        place.mkdir()
        ended = launch(place, ranks, OnSimulatedDevice(Prune(model, place / "out", options), ranks))
        assert set(ended.codes) == {0}, ended.said
    assert contents(tmp_path / "2" / "out") == contents(tmp_path / "1" / "out")
