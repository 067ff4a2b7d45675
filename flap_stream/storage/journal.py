"""The journal: which files of a run directory are complete, each with its digest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flap_stream.errors import CorruptRun
from flap_stream.storage import files
from flap_stream.storage.schema import (
    Schema,
    finite,
    hexadecimal,
    layer_digits,
    matches,
    natural,
    one_of,
    parse_json,
    within,
)

COST = {"seconds": finite, "tokens": natural, "peak_host_bytes": natural, "peak_device_bytes": natural}
_SNAPSHOT = {"name": layer_digits, "layer": within(0, 10**9), "digest": str}
ENTRY_SCHEMAS: dict[str, Schema] = {
    "tokens": {"digest": str},
    "source": {"stamps": {str: list}, "embedding": str},
    "batch": {
        **{"stage": str, "layer": natural, "run": natural, "start": natural},
        **{"size": within(1, 1 << 31), "stop?": natural},
    },
    "promise": {"name": one_of("memory"), "host_bytes": natural, "device_bytes": natural},
    "statistics-root": {},
    "statistics": {"name": layer_digits, "digest": str, "weights": str, "cost?": COST},
    "hidden": _SNAPSHOT,
    "loss-job": {"job": str, "batch_size": within(1, 1 << 31)},
    "loss-inputs": {"name": layer_digits, "job": str, "digest": str},
    "loss": {"name": layer_digits, "job": str, "digest": str},
    "hidden-loss": {"job": str, **_SNAPSHOT},
    "restoration": {"job": str},
    "refit": {"name": layer_digits, "job": str, "digest": str},
    "hidden-pruned": {"job": str, **_SNAPSHOT},
    "hidden-dense": {"job": str, **_SNAPSHOT},
    "plan": {"digest": str},
    "sweep": {"name": hexadecimal, "digest": str},
    "hidden-sweep": {"job": str, **_SNAPSHOT},
    "rewrite": {"place": str, "job": str, "restore": str, "mark?": str, "fp8?": bool},
    "shard": {"job": str, "digest": str},
}
_MAX_BYTES = 1 << 26  # limit on reading a journal; not measured


class Journal:
    """An append-only list of what is complete: one JSON line per entry, with a checksum, durable once appended.

    A last line torn by a kill is dropped. The first entry appended after opening rewrites the whole file: what an
    earlier process left may only be in the page cache.
    Raises CorruptRun if any other line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        data = files.read_plain(path, _MAX_BYTES) if path.exists() else b""
        self._lines: list[bytes] = []
        self._is_own = False
        at = 0
        for line in data.splitlines(keepends=True):
            entry = self._parse(line)
            if entry is None:
                if at + len(line) < len(data):
                    raise CorruptRun(f"{path} is damaged at byte {at}; delete the run directory")
                break
            self.entries.append(entry)
            self._lines.append(line)
            at += len(line)

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any] | None:
        digest, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or hashlib.sha256(body).hexdigest()[:16].encode() != digest:
            return None
        try:
            entry = parse_json(body)
        except ValueError:
            return None
        is_known = matches(entry, {"kind": one_of(*ENTRY_SCHEMAS), "name": str})
        return entry if is_known and matches(entry, ENTRY_SCHEMAS[entry["kind"]]) else None

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """The newest entry of that kind and name."""
        return next((e for e in reversed(self.entries) if e["kind"] == kind and e["name"] == name), None)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All entries of a kind, oldest first."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def append(self, kind: str, name: str, **values: Any) -> None:
        """Record something that is already on the disk."""
        entry = {"kind": kind, "name": name, **values}
        body = json.dumps(entry, sort_keys=True).encode()
        line = hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"
        appends, self._is_own = self._is_own, False  # if this append fails, the next rewrites the file
        if appends:
            files.append_committed(self.path, line)
        else:
            files.write_committed(self.path, b"".join([*self._lines, line]))
        self._is_own = True
        self._lines.append(line)
        self.entries.append(entry)
