"""The memory that control groups leave: the tightest limit on the way from the process's group to the root."""

import os
from pathlib import Path

import psutil
import pytest

from flap_stream.engine import control_groups, memory

MIB = 1 << 20
V1, V2 = "cgroup", "cgroup2"
_UNLIMITED = {V1: 9223372036854771712, V2: "max"}
_MOUNTS = {
    V1: ("/sys/fs/cgroup/memory", "cgroup cgroup rw,memory"),
    V2: ("/sys/fs/cgroup", "cgroup2 cgroup2 rw,nsdelegate"),
}


def made(root: Path, own: str, mounts: list[str]) -> Path:
    """A /proc/self that tells of a process's groups."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(own)
    other = "24 30 0:22 / /proc rw,nosuid - proc proc rw\n31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    (proc / "mountinfo").write_text(other + "".join(mounts))
    return root


def mount(kind: str, group: str = "/", point: str | None = None) -> str:
    place, source = _MOUNTS[kind]
    return f"36 23 0:34 {group} {point or place} rw,relatime shared:9 - {source}\n"


def add_group(root: Path, kind: str, path: str, limit: int | None, used: int, cached: int = 0, **files: str) -> None:
    """A group's directory, as its version has it."""
    directory = root / _MOUNTS[kind][0][1:] / path
    directory.mkdir(parents=True, exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes", "total_") if kind == V1 else ("max", "current", "")
    (directory / f"memory.{names[0]}").write_text(f"{_UNLIMITED[kind] if limit is None else limit * MIB}\n")
    (directory / f"memory.{names[1]}").write_text(f"{used * MIB}\n")
    stat = f"anon {(used - cached) * MIB}\n{names[2]}inactive_file {cached * MIB}\n{names[2]}active_file 0\n"
    (directory / "memory.stat").write_text(stat)
    for name, text in files.items():
        (directory / f"memory.{name}").write_text(text)


NESTED = "/user.slice/job.scope/step 7"
OWN = {V1: f"9:name=systemd:/\n4:memory:{NESTED}\n3:cpu,cpuacct:/elsewhere\n", V2: f"0::{NESTED}\n"}


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("tightest", range(4))
def test_the_tightest_group_on_the_way_up_decides(kind: str, tightest: int, tmp_path: Path) -> None:
    root = made(tmp_path, OWN[kind], [mount(kind)])
    for level, path in enumerate(["", "user.slice", "user.slice/job.scope", NESTED[1:]]):
        add_group(root, kind, path, 100 if level == tightest else 900, used=40, cached=15)
    add_group(root, kind, "user.slice/another.scope", 50, used=40)
    assert memory.free_host_bytes(root) == 75 * MIB


@pytest.mark.parametrize("kind", [V1, V2])
def test_groups_without_limits_leave_what_the_machine_has(kind: str, tmp_path: Path) -> None:
    root = made(tmp_path, OWN[kind], [mount(kind)])
    add_group(root, kind, NESTED[1:], None, used=40)
    assert memory.free_host_bytes(root) == pytest.approx(psutil.virtual_memory().available, rel=0.3)
    assert memory.free_host_bytes(tmp_path / "nothing") == pytest.approx(psutil.virtual_memory().available, rel=0.3)


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("mounted", ["/", "/docker/abc"])
def test_in_a_container_the_group_that_is_mounted_counts(kind: str, mounted: str, tmp_path: Path) -> None:
    own = {V1: "4:memory:/docker/abc\n", V2: "0::/docker/abc\n"}[kind]
    root = made(tmp_path, own, [mount(kind, mounted)])
    add_group(root, kind, "", 100, used=40)  # the path is the host's, the mount the container's own
    assert control_groups.free_bytes(root) == 60 * MIB


def test_a_group_inside_a_mounted_subtree_is_found(tmp_path: Path) -> None:
    root = made(tmp_path, "4:memory:/docker/abc/inner\n", [mount(V1, "/docker/abc")])
    add_group(root, V1, "", 100, used=40)
    add_group(root, V1, "inner", 30, used=20)
    assert control_groups.free_bytes(root) == 10 * MIB


def test_a_path_above_the_namespace_stands_for_what_is_mounted(tmp_path: Path) -> None:
    root = made(tmp_path, "0::/../outside\n", [mount(V2)])
    add_group(root, V2, "", 100, used=40)
    add_group(root, V2, "../outside", 20, used=10)
    assert control_groups.free_bytes(root) == 60 * MIB


def test_both_versions_count_where_both_are_mounted(tmp_path: Path) -> None:
    own = "4:memory:/slurm/job_1\n0::/system.slice\n"
    root = made(tmp_path, own, [mount(V1), mount(V2, point="/sys/fs/cgroup/unified")])
    add_group(root, V1, "slurm/job_1", 100, used=40)
    (root / "sys/fs/cgroup/unified/system.slice").mkdir(parents=True)  # memory is not counted there
    assert control_groups.free_bytes(root) == 60 * MIB


def test_the_bound_beyond_which_a_group_is_slowed_down_counts(tmp_path: Path) -> None:
    root = made(tmp_path, "0::/app.slice\n", [mount(V2)])
    add_group(root, V2, "app.slice", None, used=40, high=f"{90 * MIB}\n")
    assert control_groups.free_bytes(root) == 50 * MIB


def test_a_group_beyond_its_limit_has_no_room(tmp_path: Path) -> None:
    root = made(tmp_path, "0::/app.slice\n", [mount(V2)])
    add_group(root, V2, "app.slice", 30, used=40)
    assert control_groups.free_bytes(root) == 0


def test_a_mount_point_with_blanks_is_found(tmp_path: Path) -> None:
    root = made(tmp_path, "0::/\n", [mount(V2, point=r"/my\040groups")])
    add_group(root, V2, "", 100, used=40)
    (root / "sys/fs/cgroup").rename(root / "my groups")
    assert control_groups.free_bytes(root) == 60 * MIB


def test_this_process_is_found_in_its_real_group() -> None:
    found = [group for _, group in control_groups.groups() if (group / "cgroup.procs").is_file()]
    if not found:
        pytest.skip("no control groups are mounted here")
    assert any(str(os.getpid()) in (group / "cgroup.procs").read_text().split() for group in found)
