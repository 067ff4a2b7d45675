"""evaluations.json of a pruned checkpoint: perplexities of it and of its dense model, as `evaluate --save` measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flap_stream.errors import InvalidOption, NotPlain
from flap_stream.model.opening import open_checkpoint
from flap_stream.output.pruning_record import fingerprint_digest, record_of
from flap_stream.storage import files
from flap_stream.storage.schema import finite, matches, natural, parse_json

EVALUATIONS_NAME = "evaluations.json"
_EVALUATION = {
    "model": str,
    "fingerprint": str,
    "text": [str],
    "sequence_length": natural,
    "windows": natural,
    "perplexity": finite,
    "tokens?": str,
}


@dataclass(frozen=True)
class Evaluation:
    """The perplexity of a model on a text.

    model: its name; fingerprint: what tells it from others, see `fingerprint_digest`. text: names of files.
    tokens: sha256 of the windows; empty in files of earlier versions.
    """

    model: str
    fingerprint: str
    text: tuple[str, ...]
    sequence_length: int
    windows: int
    perplexity: float
    tokens: str = ""

    @property
    def on(self) -> tuple[object, ...]:
        """What it was measured on."""
        return self.text, self.sequence_length, self.windows, self.tokens


def require_pruned(out: Path) -> None:
    """Raise InvalidOption unless evaluations can be saved in `out`."""
    if record_of(out) is None:
        raise InvalidOption(f"--save {out} is not a pruned checkpoint; give the output directory of flap-stream prune")


def read_evaluations(out: Path) -> list[Evaluation]:
    """Those saved in a pruned checkpoint. Raises InvalidOption if the file is damaged."""
    path = out / EVALUATIONS_NAME
    if not path.exists():
        return []
    try:
        found = parse_json(files.read_plain(path))
    except (OSError, ValueError, NotPlain):
        found = None
    if not matches(found, [_EVALUATION]):
        raise InvalidOption(f"{path} is damaged; delete it and run evaluate --save again")
    return [Evaluation(**{**each, "text": tuple(each["text"])}) for each in found]


def save_evaluation(out: Path, evaluation: Evaluation) -> None:
    """Add an evaluation to those of a pruned checkpoint, in place of an older one of the same model and text."""
    others = [e for e in read_evaluations(out) if (e.fingerprint, e.on) != (evaluation.fingerprint, evaluation.on)]
    contents = json.dumps([asdict(each) for each in (*others, evaluation)], indent=1)
    files.write_committed(out / EVALUATIONS_NAME, contents.encode() + b"\n")


Pair = tuple[Evaluation | None, Evaluation]  # of the dense model, if it was saved, and of the pruned one


def saved_pairs(out: Path, record: dict[str, Any]) -> list[Pair]:
    """What is saved in a pruned checkpoint of itself, each with the dense model's on the same text. record: its own."""
    found = read_evaluations(out)
    if not found:
        return []
    with open_checkpoint(out) as checkpoint:
        own = fingerprint_digest(checkpoint.fingerprint)
    before = {each.on: each for each in found if each.fingerprint == record["base"].get("fingerprint")}
    return [(before.get(each.on), each) for each in found if each.fingerprint == own]
