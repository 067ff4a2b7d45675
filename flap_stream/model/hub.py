"""Models on the Hub: which files of a repository are fetched, and, if that fails, why."""

import glob
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flap_stream.errors import FlapStreamError, HubFailure, InvalidModel, StorageFailure
from flap_stream.model.model_files import CONFIG_NAME, is_carried, read_json, require_model

logger = logging.getLogger(__name__)

_LONGEST_NAME = 500  # characters

# Given the directory with all small files and the names of all files of the repository: which others are needed.
Choose = Callable[[Path, Sequence[str]], Sequence[str]]


def is_path(model: str) -> bool:
    """Whether the name of a model, if there is nothing of that name here, can only be a path."""
    return model.startswith(("/", ".", "~")) or model.partition("@")[0].count("/") > 1


def split_revision(model: str) -> tuple[str, str | None]:
    """Repository and revision of `name` or `name@revision`."""
    name, _, revision = model.partition("@")
    return name, revision or None


def base_name(base: str) -> str:
    """A model's name: the last part of its directory or Hub id, as printable text."""
    name = Path(base).name
    name = Path(base).resolve().name if name in ("", "..") else name
    return "".join(c if c.isprintable() else "?" for c in name)[:_LONGEST_NAME]


def fetched(model: str, choose: Choose | None) -> Path:
    """The directory in the Hub cache with a model's small files and those chosen, fetched if they are missing.

    model: `name` or `name@revision`. choose: None fetches only config.json.
    Without a connection (or access), the cache is used if it is complete.
    Raises InvalidModel or HubFailure, which say whether the model is gated or unknown, or the user offline or not
    logged in.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    repository, revision = split_revision(model)
    try:
        return _downloaded(model, choose)
    except HFValidationError as error:
        raise InvalidModel(f"no such model: {model} is neither a directory nor a valid Hub id") from error
    except RevisionNotFoundError as error:
        raise _failure(model, error) from error
    except (HTTPError, OSError) as error:  # HTTPError: the base of all errors of the HTTP library
        cached = _cached(repository, revision, choose)
        if cached is None:
            raise _failure(model, error) from error
        if not isinstance(error, OfflineModeIsEnabled):
            logger.warning("%s is taken from the Hub cache, since the Hub failed with %s", model, type(error).__name__)
        return cached


def _downloaded(model: str, choose: Choose | None) -> Path:
    """Fetch the small files, then the files chosen from what they say."""
    from huggingface_hub import HfApi, hf_hub_download

    repository, revision = split_revision(model)
    names = [sibling.rfilename for sibling in HfApi().model_info(repository, revision=revision).siblings or []]
    adapter = "adapter_config.json"

    def read_adapter() -> dict[str, Any]:
        return read_json(Path(hf_hub_download(repository, adapter, revision=revision)), "the Hub has it damaged")

    require_model(model, names, read_adapter)
    small = [CONFIG_NAME] if choose is None else [name for name in names if _is_small(name)]
    directory = _snapshot(repository, revision, small)
    if choose is not None:
        _snapshot(repository, directory.name, choose(directory, names))  # of the same commit
    return directory


def _snapshot(repository: str, revision: str | None, names: Sequence[str], from_cache: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=from_cache))


def _is_small(name: str) -> bool:
    """What is fetched before the weights are chosen: config, tokenizer, licence, card, and indices of safetensors."""
    is_index = "/" not in name and name.endswith(".safetensors.index.json") and not name.startswith("consolidated")
    return name in (CONFIG_NAME, "README.md") or is_index or is_carried(name)


def _cached(repository: str, revision: str | None, choose: Choose | None) -> Path | None:
    """The directory in the Hub cache, if it has everything needed."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = _snapshot(repository, revision, [CONFIG_NAME], from_cache=True)
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
        wanted = [] if choose is None else choose(directory, names)
    except (LocalEntryNotFoundError, InvalidModel):
        return None
    return directory if all((directory / name).is_file() for name in (CONFIG_NAME, *wanted)) else None


def _failure(model: str, error: Exception) -> FlapStreamError:
    """Our error for one of the Hub's library, by its class: what it means for the user."""
    from huggingface_hub import constants, errors, get_token

    repository, revision = split_revision(model)
    url, is_known = f"{constants.ENDPOINT}/{repository}", get_token() is not None
    if isinstance(error, errors.GatedRepoError):
        if is_known:
            return InvalidModel(f"{model} is gated and your account has no access to it; request access at {url}")
        return InvalidModel(
            f"{model} is gated and you are not logged in; accept its terms at {url}, then run `hf auth login` (or set "
            "HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        way = "or your account has no access" if is_known else "or it is private: then run `hf auth login`"
        return InvalidModel(f"no such model: {model} is not a directory, and the Hub has no {repository}, {way}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InvalidModel(f"{repository} has no revision {revision} on the Hub; see {url}/tree/main for its branches")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InvalidModel(
            f"no such model: {model} is not a directory, and as a Hub id it is incomplete in the cache "
            f"{constants.HF_HUB_CACHE} while HF_HUB_OFFLINE forbids fetching it; unset that, or copy it there with "
            "`hf download`"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no status"
        if status in (401, 403):
            return InvalidModel(f"the Hub refuses your token for {model} ({status}); run `hf auth login` again")
        return HubFailure(f"the Hub answered {status} for {model}; wait a while, then run the same command again")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, errors.LocalEntryNotFoundError):
        return StorageFailure.of(error)
    return HubFailure(
        f"the Hub cannot be reached at {constants.ENDPOINT} ({type(error).__name__}), and {model} is neither a "
        "directory nor complete in the Hub cache; connect, then run the same command again"
    )
