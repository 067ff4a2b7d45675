"""The journal: which files of a run directory are complete, each with its digest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flap_stream import files
from flap_stream.errors import CorruptRun
from flap_stream.json_form import has_form

ENTRY_FORMS = {
    "tokens": {"digest": str},
    "source": {"stamps": dict, "embedding": str},
    "batch": {"step": int, "start": int, "size": int},
    "statistics-root": {},
    "statistics": {"digest": str, "weights": str},
    "hidden": {"layer": int, "digest": str},
    "restoration": {"job": str},
    "refit": {"job": str, "digest": str},
    "hidden-pruned": {"job": str, "layer": int, "digest": str},
    "hidden-dense": {"job": str, "layer": int, "digest": str},
    "plan": {"digest": str},
    "sweep": {"digest": str},
    "hidden-sweep": {"job": str, "layer": int, "digest": str},
    "rewrite": {"place": str, "job": str, "restore": str},
    "shard": {"job": str, "digest": str},
}


class Journal:
    """An append-only list of what is complete: one checked JSON line an entry, on the disk before it counts.

    A last line that was torn by a kill is dropped. The first entry that an opened journal takes rewrites it whole: what
    an earlier process left may be in the page cache alone.
    Raises CorruptRun if any other line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        data = path.read_bytes() if path.exists() else b""
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
            entry = json.loads(body)
        except (ValueError, RecursionError):
            return None
        known = has_form(entry, {"kind": str, "name": str}) and has_form(entry, ENTRY_FORMS.get(entry["kind"], str))
        return entry if known else None

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """The newest entry of that kind and name."""
        return next((e for e in reversed(self.entries) if e["kind"] == kind and e["name"] == name), None)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All entries of a kind, oldest first."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def append(self, kind: str, name: str, **values: Any) -> None:
        """Record something that is on the disk already."""
        entry = {"kind": kind, "name": name, **values}
        body = json.dumps(entry, sort_keys=True).encode()
        line = hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"
        appends, self._is_own = self._is_own, False  # should this fail, the next entry rewrites it
        if appends:
            files.append_committed(self.path, line)
        else:
            files.write_committed(self.path, b"".join([*self._lines, line]))
        self._is_own = True
        self._lines.append(line)
        self.entries.append(entry)
