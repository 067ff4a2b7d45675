"""Jobs started as users start them: by torchrun or accelerate launch, on this machine or on two that are not there."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import meeting
from warm_commands import WarmProcess

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
ALONE = [sys.executable]
HOSTS = ("flapA", "flapB")


def torchrun(ranks: int) -> list[str]:
    return [*TORCHRUN, "--nproc-per-node", str(ranks)]


def accelerate(ranks: int) -> list[str]:
    """By itself accelerate starts one process on a machine without GPUs; --multi_gpu has it start them on CPUs too."""
    machine = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*ACCELERATE, "--multi_gpu", "--num_processes", str(ranks), *machine]


def start(launcher: Sequence[str], arguments: Sequence[str], **changes: str) -> subprocess.Popen[str]:
    """`python -m flap_stream` under a launcher. changes: of the environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [*launcher, "-m", "flap_stream", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def finish(launcher: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """What a whole job says with --json."""
    with start(launcher, [*arguments, "--json", "--quiet"]) as process:
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(out)


def finish_warm(ranks: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The same of a command alone, or of ranks that this starts as a launcher would, forked when all is imported."""
    _store, environments = meeting(ranks) if ranks > 1 else (None, [{}])
    command = [sys.executable, "-m", "flap_stream", *arguments, "--json", "--quiet"]
    with ExitStack() as stack:
        processes = [stack.enter_context(WarmProcess(command, env={**os.environ, **own})) for own in environments]
        said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, said
    return json.loads(said[0][0])


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank to process id of the running ranks that a launcher has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher:
                variables = dict(v.split("=", 1) for v in (path / "environ").read_text().split("\0") if "=" in v)
                found[int(variables["RANK"])] = int(path.name)
        except (OSError, KeyError):
            continue  # ended meanwhile, or no rank
    return found


def wait_for(condition: Any, seconds: float) -> Any:
    """What the condition gives, once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.02)
    return found


@contextmanager
def two_hosts() -> Any:
    """Two network namespaces with a wire between them, as two hosts that share all their files.

    Returns launchers that take the number of ranks on each. Skips where namespaces may not be made.
    """
    commands = [
        *[f"ip netns add {host}" for host in HOSTS],
        f"ip link add {HOSTS[0]} netns {HOSTS[0]} type veth peer name {HOSTS[1]} netns {HOSTS[1]}",
        *[f"ip -n {host} addr add 10.213.7.{n}/24 dev {host}" for n, host in enumerate(HOSTS, 1)],
        *[f"ip -n {host} link set {device} up" for host in HOSTS for device in ("lo", host)],
    ]
    try:
        for command in commands:
            try:
                done = subprocess.run(command.split(), capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("no network namespaces: iproute2's ip is not installed")
            if done.returncode:
                pytest.skip(f"no network namespaces: `{command}` said {done.stderr.strip()}")
        yield [
            lambda ranks, number=number, host=host: [
                *("ip", "netns", "exec", host, "env", f"GLOO_SOCKET_IFNAME={host}", *TORCHRUN),
                *("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", str(ranks)),
                *("--master-addr", "10.213.7.1", "--master-port", "29517"),
            ]
            for number, host in enumerate(HOSTS)
        ]
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
