"""`push`: a pruned checkpoint as a repository on the Hub, with a card that says how it was made and what it scores."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from flap_stream.config import PushConfig
from flap_stream.config.rules import options_of
from flap_stream.errors import (
    CorruptCheckpoint,
    FlapStreamError,
    HubFailure,
    InvalidInput,
    InvalidOption,
    StorageFailure,
)
from flap_stream.output.digests import DIGESTS_NAME, damaged_files, digests_file, read_digests
from flap_stream.output.evaluations import Evaluation, Pair, saved_pairs
from flap_stream.output.pruning_record import record_of
from flap_stream.output.recipe import RECIPE_NAME
from flap_stream.storage import files

_CARD_NAME = "README.md"


@dataclass(frozen=True)
class PushResult:
    """A repository, the commit that was made, and what it holds; every file there was compared by its digest."""

    url: str
    commit: str
    files: int
    nbytes: int


def push(out: str | Path, repository: str, options: PushConfig | None = None, **keywords: Any) -> PushResult:
    """Upload a pruned checkpoint to a repository on the Hub, which is created if there is none.

    What an interrupted call has uploaded is not sent again. keywords: the fields of `PushConfig`.
    Raises InvalidInput if `out` is not as it was written, or no base model is known, HubFailure if the Hub fails.
    """
    options, out = options_of(PushConfig, "push", options, keywords), Path(out)
    contents, digests = _contents(out, options)
    api = HfApi()
    try:
        if get_token() is None:
            raise InvalidInput(
                "you are not logged in; run `hf auth login` (or set HF_TOKEN) with a token that may write"
            )
        url = api.create_repo(repository, private=options.private, exist_ok=True)
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        made = api.create_commit(url.repo_id, additions, commit_message="Upload a model pruned by flap-stream")
        there = api.get_paths_info(url.repo_id, list(contents), revision=made.oid)
    except RuntimeError as error:  # what the library makes of an error while a large file is sent
        raise _failure(repository, error.__cause__ or error) from error
    except (HFValidationError, HTTPError, OSError) as error:
        raise _failure(repository, error) from error
    found = {entry.path: entry for entry in there if isinstance(entry, RepoFile)}
    wrong = [n for n in contents if n not in found or not _is_same(contents[n], digests[n], found[n])]
    if wrong:
        raise HubFailure(f"{url} has {', '.join(wrong)} not as sent; run the same command again")
    sizes = [len(c) if isinstance(c, bytes) else c.stat().st_size for c in contents.values()]
    return PushResult(str(url), made.oid, len(contents), sum(sizes))


def _contents(out: Path, options: PushConfig) -> tuple[dict[str, bytes | Path], dict[str, str]]:
    """What to upload, by name: the files that SHA256SUMS lists, the card with what is known now, new digests.

    The second value has the digests, by name.
    """
    record = record_of(out)
    if record is None:
        raise InvalidInput(f"{out} is not a pruned checkpoint; give the output directory of flap-stream prune")
    if damaged := damaged_files(out):
        raise CorruptCheckpoint(f"{out} is not as it was written: {', '.join(damaged)}; prune again into another OUT")
    digests = read_digests(out)
    card = _card(out, record, options).encode()
    digests[_CARD_NAME] = hashlib.sha256(card).hexdigest()
    named = {name: out / name for name in digests}
    sums = digests_file(digests)
    digests[DIGESTS_NAME] = hashlib.sha256(sums).hexdigest()
    return {**named, _CARD_NAME: card, DIGESTS_NAME: sums}, digests


def _card(out: Path, record: dict[str, Any], options: PushConfig) -> str:
    """The checkpoint's own card, with its base model, its recipe, and what it scores."""
    card = ModelCard.load(out / _CARD_NAME)
    card.data.base_model = options.base_model or card.data.base_model
    if not card.data.base_model:
        raise InvalidOption(
            f"{out} was made from a directory, {record['base']['name']}; give the Hub id of that model as --base-model "
            "NAMESPACE/NAME"
        )
    measured = saved_pairs(out, record)
    if measured:
        card.data.model_name = f"{record['base']['name']}, pruned"
        card.data.eval_results = [_result(after) for _, after in measured]
        card.text += _perplexities(measured)
    recipe = out / RECIPE_NAME
    if recipe.is_file():
        command = f"flap-stream prune {card.data.base_model} pruned --recipe {RECIPE_NAME}"
        options_text = files.read_plain(recipe).decode(errors="replace")
        card.text += f"\n## How it was made\n\n```sh\n{command}\n```\n\n```toml\n{options_text}```\n"
    return str(card)


def _result(evaluation: Evaluation) -> EvalResult:
    """An evaluation as the Hub's metadata has it."""
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=", ".join(evaluation.text),
        metric_type="perplexity",
        metric_name=f"perplexity, {evaluation.windows} windows of {evaluation.sequence_length} tokens",
        metric_value=round(evaluation.perplexity, 4),
    )


def _perplexities(measured: Sequence[Pair]) -> str:
    rows = [
        f"| {', '.join(after.text)} | {after.windows} of {after.sequence_length} tokens | "
        f"{'' if before is None else f'{before.perplexity:.2f}'} | {after.perplexity:.2f} |"
        for before, after in measured
    ]
    head = ["\n## Perplexity\n", "| text | windows | dense | pruned |", "|---|---|---|---|"]
    return "\n".join((*head, *rows, ""))


def _is_same(content: bytes | Path, digest: str, there: RepoFile) -> bool:
    """Whether the repository's digest is that of the content: sha256 of large files, git's own of the others."""
    if there.lfs is not None:
        return there.lfs.sha256 == digest
    data = content if isinstance(content, bytes) else content.read_bytes()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _failure(repository: str, error: BaseException) -> FlapStreamError:
    """Our error for one of the Hub's library."""
    if isinstance(error, HFValidationError):
        return InvalidOption(f"{repository!r} is not the name of a repository; write it as NAMESPACE/NAME")
    if isinstance(error, OfflineModeIsEnabled):
        return InvalidInput("HF_HUB_OFFLINE forbids uploading; unset it, then run the same command again")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no status"
        if status in (401, 403):
            return InvalidInput(
                f"the Hub refuses your token for {repository} ({status}); it needs the right to write there: run "
                "`hf auth login` with another"
            )
        return HubFailure(
            f"the Hub answered {status} for {repository}; wait a while, then run the same command again: what was "
            "uploaded is not sent again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return StorageFailure.of(error)
    return HubFailure(
        f"the Hub cannot be reached at {constants.ENDPOINT} ({type(error).__name__}); connect, then run the same "
        "command again: what was uploaded is not sent again"
    )
