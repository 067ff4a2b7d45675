"""Any number of ranks makes what one process makes, byte for byte; and if one dies, the others end and any go on."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import KILLED
from launchers import accelerate, finish, finish_warm, ranks_of, start, torchrun, two_hosts, wait_for
from models import contents, random_tokens, save, save_tokens, tiny_config, tiny_model
from rank_jobs import LENGTH, WINDOWS, RankJob, launch

import flap_stream
from flap_stream.config import EvaluateConfig
from flap_stream.engine.ranks import ALONE as ONE
from flap_stream.engine.ranks import Ranks
from flap_stream.errors import RankLost
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.skeleton import Skeleton

pytestmark = pytest.mark.slow

KILLS, REFIT_KILLS = 12, 5
REFIT_LENGTH = 512  # so that each rank has products of its own


# --- the same bytes ---


@dataclass(frozen=True)
class Command:
    """Arguments of a command line without OUT, what one process makes of it, and what it says at the end."""

    arguments: list[str]
    expected: dict[str, bytes]
    said: dict[str, Any]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    place = tmp_path_factory.mktemp("command")
    save(tiny_model(tiny_config(layers=8)), place / "model", shard_size="100KB")
    tokens = save_tokens(place / "tokens.npy", random_tokens(WINDOWS, LENGTH))
    arguments = ["prune", str(place / "model"), "--calibration", tokens, "--samples", str(WINDOWS), "--ratio", "0.3"]
    arguments += ["--sequence-length", str(LENGTH), "--batch-size", "4", "--max-shard-size", "100KB"]
    said = finish_warm(1, [*arguments, str(place / "out")])
    return Command(arguments, contents(place / "out"), said)


@pytest.mark.parametrize("launcher", [torchrun(2), 4, accelerate(2)], ids=["2", "4", "accelerate"])
def test_launched_ranks_write_what_one_process_writes_and_read_no_more(
    command: Command, tmp_path: Path, launcher: list[str] | int
) -> None:
    run: Any = finish_warm if isinstance(launcher, int) else finish
    said = run(launcher, [*command.arguments, str(tmp_path / "out")])
    assert contents(tmp_path / "out") == command.expected
    assert said["node_bytes_read"] == [command.said["bytes_read"]]
    assert said["bytes_written"] == command.said["bytes_written"]
    assert said["realised_ratio"] == command.said["realised_ratio"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ranks_on_two_hosts_write_what_one_process_writes(command: Command, tmp_path: Path) -> None:
    with two_hosts() as hosts, ExitStack() as stack:
        arguments = [*command.arguments, str(tmp_path / "out"), "--json", "--quiet"]
        processes = [stack.enter_context(start(host(1), arguments)) for host in hosts]
        said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert contents(tmp_path / "out") == command.expected
    layers = layer_bytes(Path(command.arguments[1]))
    found = json.loads(said[0][0])["node_bytes_read"]
    assert min(found) >= layers and sum(found) == command.said["bytes_read"] + layers


def layer_bytes(model: Path) -> int:
    with open_checkpoint(model) as checkpoint:
        return sum(entry.nbytes for name, entry in checkpoint.tensors.items() if ".layers." in name)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> RankJob:
    return RankJob(tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"statistics": "released", "batch_size": 4}),
        ({}, {"method": "wanda-sp", "structure": None, "ratio": 0.5}),
        ({}, {"method": "magnitude-sp", "structure": None}),
        ({}, {"dtype": "bfloat16"}),
        ({}, {"restore": "least-squares", "length": REFIT_LENGTH}),
        ({}, {"restore": "least-squares", "dtype": "bfloat16", "length": REFIT_LENGTH}),
        ({"family": "qwen3_moe"}, {}),
        ({}, {"restore": "reconstruct"}),
        ({"family": "mixtral"}, {"metric": "fisher", "loss_windows": 11}),
        ({"family": "gemma3n_text"}, {}),
        ({"intermediate_size": 1000, "hidden_size": 128}, {"batch_size": 8}),
    ],
    ids=[
        "released",
        "wanda-sp",
        "magnitude-sp",
        "cast",
        "least-squares",
        "least-squares in bf16",
        "experts",
        "reconstruct",
        "loss",
        "per-layer inputs",
        "wide",
    ],
)
def test_whatever_is_collected_three_ranks_on_two_nodes_give_the_same_bytes(
    tmp_path: Path, config: dict[str, Any], options: dict[str, Any]
) -> None:
    job = RankJob(tmp_path, tiny_config(**{"layers": 3, **config}), **options)
    assert job.trouble("three", 3, nodes=2) is None


def test_two_and_four_ranks_sweep_the_loss_to_the_same_bytes(tmp_path: Path) -> None:
    job = RankJob(tmp_path, tiny_config(layers=2), metric="fisher", loss_windows=10)
    assert any(name.startswith("loss.zarr") for name in job.statistics)
    assert [job.trouble(f"ranks-{ranks}", ranks) for ranks in (2, 4)] == [None, None]


def test_more_ranks_than_batches_give_the_same_bytes(job: RankJob) -> None:
    assert job.trouble("many", 9) is None


class OnDisk:
    """The job with hidden states on disk."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def __call__(self) -> None:
        from flap_stream.engine import streamed_model
        from flap_stream.engine.hidden_states import make_hidden_states

        on_disk: Any = lambda place, *rest: make_hidden_states("disk", *rest)  # noqa: E731
        streamed_model.make_hidden_states = on_disk  # type: ignore[attr-defined]
        self.action()


def test_hidden_states_of_ranks_on_disk_give_the_same_bytes(job: RankJob) -> None:
    assert launch(job.place("disk"), 3, OnDisk(job.action("disk", keep_run=True))).codes == [0, 0, 0]
    assert job.difference("disk") is None


class Evaluate:
    """A call of `evaluate`, whose result every rank writes down."""

    def __init__(self, model: Path, text: str, result: Path) -> None:
        self.model, self.text, self.result = model, text, result

    def __call__(self) -> None:
        options = EvaluateConfig(text=(self.text,), sequence_length=LENGTH, batch_size=4)
        found = flap_stream.evaluate(self.model, options)
        rank = os.environ.get("RANK", "alone")
        self.result.with_suffix(f".{rank}").write_text(json.dumps([found.perplexity, found.windows, found.bytes_read]))


def test_ranks_evaluate_to_the_last_bit_what_one_process_does(job: RankJob, tmp_path: Path) -> None:
    action = Evaluate(job.directory / "one" / "out", str(job.options.calibration[0]), tmp_path / "result")
    assert launch(tmp_path / "one", 1, action).codes == [0]
    assert launch(tmp_path / "three", 3, action).codes == [0, 0, 0]
    found = {path.suffix: json.loads(path.read_text()) for path in tmp_path.glob("result.*")}
    assert set(found) == {".alone", ".0", ".1", ".2"}
    assert all(value == found[".alone"] for value in found.values())


# --- when something fails ---


class Smaller:
    """The job on devices that one rank has less memory of than the others, from some layer on."""

    def __init__(self, action: Callable[[], None], rank: int, layer: int, most: int) -> None:
        self.action, self.rank, self.layer, self.most = action, rank, layer, most

    def __call__(self) -> None:
        run_layer = Skeleton.run_layer

        def limited(skeleton: Skeleton, index: int, weights: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
            output = run_layer(skeleton, index, weights, hidden, *rest)
            is_real = type(hidden) is torch.Tensor  # not that of a prediction
            if is_real and index >= self.layer and len(hidden) > self.most and os.environ["RANK"] == str(self.rank):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return output

        Skeleton.run_layer = limited  # type: ignore[method-assign, assignment]
        self.action()


def test_a_batch_that_one_rank_halved_is_halved_again_by_any_number_of_ranks(job: RankJob) -> None:
    names = {"whole": None, "resumed": 2}
    for name, stop in names.items():
        place = job.place(f"halved-{name}")
        action = Smaller(job.action(f"halved-{name}", keep_run=True), rank=1, layer=1, most=2)
        codes = launch(place, 3, action if stop is None else StopAt(action, stop)).codes
        assert codes == [0, 0, 0] if stop is None else all(codes)
    for snapshot in (job.place("halved-resumed") / "out.run" / "hidden").iterdir():
        snapshot.unlink()  # so that every layer is run again
    assert job.run("halved-resumed", 1, keep_run=True).codes == [0]
    ours, theirs = (
        contents(job.place(f"halved-{name}") / "out.run" / "statistics.zarr") for name in ("whole", "resumed")
    )
    assert ours == theirs != job.statistics
    assert '"size": 1' in (job.place("halved-whole") / "out.run" / "journal").read_text()


class StopAt:
    """The job, interrupted when a layer's statistics would be stored."""

    def __init__(self, action: Callable[[], None], layer: int) -> None:
        self.action, self.layer = action, layer

    def __call__(self) -> None:
        from flap_stream.storage.collected import StatisticsStore

        write = StatisticsStore.write

        def stop(statistics: StatisticsStore, index: int, *values: Any) -> None:
            if index == self.layer:
                raise KeyboardInterrupt
            write(statistics, index, *values)

        StatisticsStore.write = stop  # type: ignore[method-assign, assignment]
        self.action()


def test_a_failure_of_one_rank_ends_all_with_its_sentence_once(job: RankJob, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(layers=3))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    broken = save(model, tmp_path / "model")
    ended = launch(tmp_path / "job", 3, job.action("failed", model=broken))
    assert ended.codes == [2, 2, 2]
    (sentence,) = ended.sentences
    assert "tensor model.layers.1.mlp.up_proj.weight" in sentence and "NaN or infinity" in sentence
    assert ended.seconds < 5


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_interrupted_rank_ends_all_and_says_so_once(job: RankJob, ranks: int) -> None:
    place = job.place(f"interrupted-{ranks}")
    ended = launch(place, ranks, StopAt(job.action(f"interrupted-{ranks}", keep_run=True), 2))
    assert ended.codes == [130] * ranks
    assert len(ended.sentences) == 1 and "run the same command again to continue" in ended.sentences[0]
    assert job.trouble(f"interrupted-{ranks}", 5 - ranks) is None


class KilledOnLeaving:
    """The job, of which one rank is killed just before or just after it says that it has nothing left to do."""

    def __init__(self, action: Callable[[], None], rank: int, is_said: bool) -> None:
        self.action, self.rank, self.is_said = action, rank, is_said

    def __call__(self) -> None:
        from flap_stream.engine import membership, watchdog

        leave = membership._Membership.leave

        def die(job: Any, own: Ranks) -> None:
            if own.rank == self.rank:
                if self.is_said:
                    job._store.set(watchdog.done_keys(own.world)[own.rank], "")
                os.kill(os.getpid(), signal.SIGKILL)
            leave(job, own)

        membership._Membership.leave = die  # type: ignore[method-assign, assignment]
        self.action()


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("is_said, code", [(True, 0), (False, RankLost.exit_code)], ids=["done", "not done"])
def test_ranks_end_alike_when_one_is_killed_while_all_leave(job: RankJob, rank: int, is_said: bool, code: int) -> None:
    name = f"leaving-{rank}-{is_said}"
    ended = launch(job.place(name), 4, KilledOnLeaving(job.action(name, keep_run=True), rank, is_said), nodes=2)
    assert ended.codes == [-signal.SIGKILL if other == rank else code for other in range(4)]
    assert len(ended.sentences) == (code != 0)
    assert job.difference(name) is None


class KilledOnConnecting:
    """The job, of which one rank is killed after it has said where it listens, before others connect to it."""

    def __init__(self, action: Callable[[], None], rank: int) -> None:
        self.action, self.rank = action, rank

    def __call__(self) -> None:
        def die(*arguments: Any, **keywords: Any) -> None:
            if keywords["rank"] == self.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.3)  # gloo finds nobody there, which it says after three tries
            raise RuntimeError("Gloo connectFullMesh failed with timed out connecting: SO_ERROR: Connection refused")

        setattr(torch.distributed, "init_process_group", die)  # noqa: B010 (in a process of its own)
        self.action()


def test_a_rank_that_is_killed_while_others_connect_to_it_is_said(job: RankJob) -> None:
    ended = launch(job.place("connecting"), 3, KilledOnConnecting(job.action("connecting"), 1))
    assert ended.codes == [RankLost.exit_code, -signal.SIGKILL, RankLost.exit_code]
    (sentence,) = ended.sentences
    assert "rank 1 of 3" in sentence


@pytest.mark.timeout(200)
def test_whichever_rank_is_killed_the_others_end_and_any_number_goes_on_to_the_same_bytes(job: RankJob) -> None:
    found = [job.trouble_after_kill(number, 10) for number in range(KILLS)]
    assert [one for one in found if one[0] not in ("went on", "done before the kill")] == []
    assert sum(became == "went on" for became, _ in found) > KILLS // 2


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "options",
    [{"restore": "least-squares", "length": REFIT_LENGTH}, {"restore": "reconstruct"}],
    ids=["least-squares", "reconstruct"],
)
def test_killed_while_they_refit_any_number_goes_on_to_the_same_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    job = RankJob(tmp_path, tiny_config(layers=2), **options)
    found = [job.trouble_after_kill(number, 10) for number in range(REFIT_KILLS)]
    assert [one for one in found if one[0] not in ("went on", "done before the kill")] == []


def test_torchrun_and_the_other_ranks_end_when_one_is_killed(command: Command, tmp_path: Path) -> None:
    arguments = [*command.arguments, str(tmp_path / "out")]
    with start(torchrun(2), arguments) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("collect: 3/"):
                break
        processes = ranks_of(process.pid)
        os.kill(processes[1], signal.SIGKILL)
        started = time.monotonic()
        wait_for(lambda: not Path(f"/proc/{processes[0]}").exists(), 10)
        said = process.stderr.read()
    assert time.monotonic() - started < 15
    sentences = [line for line in said.splitlines() if line.startswith("flap-stream: ")]
    assert len(sentences) == 1 and "rank 1 of 2 exited unexpectedly" in sentences[0]
    finish_warm(1, arguments)
    assert contents(tmp_path / "out") == command.expected


def test_ranks_that_see_different_models_are_refused(job: RankJob, tmp_path: Path) -> None:
    other = save(tiny_model(tiny_config(layers=2)), tmp_path / "other")
    ended = launch(tmp_path / "job", 2, Differing(job, other))
    assert ended.codes == [2, 2]
    assert len(ended.sentences) == 1 and "must see the same files" in ended.sentences[0]


class Differing:
    """The job with another model for rank 1."""

    def __init__(self, job: RankJob, model: Path) -> None:
        self.actions = [job.action("differing"), job.action("differing", model=model)]

    def __call__(self) -> None:
        self.actions[int(os.environ["RANK"])]()


class OnDevices:
    """The job, one rank on a device of another type and with less memory."""

    def __init__(self, action: Callable[[], None], types: list[str], memory: list[int]) -> None:
        self.action, self.types, self.memory = action, types, memory

    def __call__(self) -> None:
        from flap_stream.engine import memory
        from flap_stream.engine import streamed_model as layers

        rank = int(os.environ["RANK"])
        if self.types[rank] != "cpu":
            layers.choose_device = lambda name: torch.device("meta")  # type: ignore[attr-defined]
        limits = memory.Limits(self.memory[rank], 0)
        memory.limits = lambda *how: limits
        self.action()


def test_devices_of_two_types_are_refused(job: RankJob, tmp_path: Path) -> None:
    ended = launch(tmp_path / "job", 2, OnDevices(job.action("types"), ["cpu", "meta"], [1 << 33, 1 << 33]))
    assert ended.codes == [2, 2]
    assert len(ended.sentences) == 1 and "ranks run on cpu and meta" in ended.sentences[0]


def test_the_rank_with_least_memory_decides_for_all(job: RankJob, tmp_path: Path) -> None:
    ended = launch(tmp_path / "job", 3, OnDevices(job.action("least"), ["cpu"] * 3, [1 << 33, 1 << 26, 1 << 33]))
    assert ended.codes == [2, 2, 2]
    assert len(ended.sentences) == 1 and "64.0 MiB may be used" in ended.sentences[0]


def test_a_rank_of_one_gives_back_what_it_was_given() -> None:
    assert ONE.gathered(3) == [3] and ONE.exchanged(["x"]) == ["x"] and ONE.from_first(lambda: 4) == 4
    assert list(ONE.in_order(iter([memoryview(b"ab")]), 4)) == [b"ab"]
    assert Ranks().is_first and Ranks().leads_node and KILLED == -9
