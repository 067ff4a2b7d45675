"""Opening a model, a directory or a Hub id: its config.json, index and headers are read and checked.

Tensors get the names that the pruned class of their family has for them.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flap_stream.errors import InvalidModel
from flap_stream.model import hub
from flap_stream.model.architecture import Family, dense_type, further_layers, is_pruned, with_layer_count
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import FAMILIES, require_causal, row_of
from flap_stream.model.fused_experts import separated
from flap_stream.model.model_files import CONFIG_NAME, WeightFiles, has_weights, read_json, require_model
from flap_stream.model.model_files import weight_files as weight_files_of
from flap_stream.model.multimodal import Wrapper, nested, text_config, wrapper_of
from flap_stream.model.quantised import is_decodable, with_values, without_quantization
from flap_stream.model.safetensors_format import TensorEntry, read_header
from flap_stream.model.shard_files import ShardFiles, stamp
from flap_stream.model.tying import settle_head
from flap_stream.storage.files import require_plain_folder

logger = logging.getLogger(__name__)

# A buffer in older checkpoints, which transformers computes itself and does not read.
_IGNORED = re.compile(r"^model\..*rotary_emb\.inv_freq$")


def read_config(model: str) -> tuple[Path, dict[str, Any]]:
    """Directory and contents of the config.json of a directory, a file or a Hub id; no weights are downloaded.

    Of a multimodal model, the contents are those of its text decoder.
    Raises InvalidModel if there is none.
    """
    path = Path(model)
    if not path.is_file() or path.suffix != ".json":
        path = _resolve(model, weights=False) / CONFIG_NAME
        names = [file.name for file in path.parent.iterdir()]
        require_model(model, names, lambda: read_json(path.parent / "adapter_config.json", "download it again"))
    config = nested(with_layer_count(dense_type(read_json(path, "a dry run needs it"))))
    _warn_of_own_code(model, config)
    config = without_quantization(config) if is_decodable(config) else config
    return path.parent, config if wrapper_of(config, ()) is None else text_config(config)


def has_shards(directory: Path) -> bool:
    """Whether a directory holds safetensors under the names that transformers gives them."""
    return has_weights([path.name for path in directory.iterdir()])


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Read and check config.json, the index and all shard headers of a directory or a Hub id.

    Quantised matrices are seen decoded (see quantised.py), and the config as that of such a model.
    Where a family's dense checkpoints and its pruned class name tensors differently, the latter's names are used. A
    head that exists despite `tie_word_embeddings` is handled as in transformers (see tying.py).
    Raises InvalidModel if there is no such model or no safetensors in it, CorruptCheckpoint for a shard that is
    missing, truncated or whose header is inconsistent.
    """
    directory = _resolve(str(model), weights=True)
    require_plain_folder(directory)
    config, weights = _config_and_weights(str(model), directory, [path.name for path in directory.iterdir()])
    config.pop("transformers_weights", None)  # names these files, not those written from them
    if weights.note:
        logger.warning("%s", weights.note)
    _warn_of_own_code(str(model), config)
    tensors: dict[str, TensorEntry] = {}
    header_digests, shard_bytes, stamps = {}, {}, {}
    for file in weights.files:
        if (directory / file).exists():
            stamps[file] = stamp(directory / file)  # before anything of it is read
        entries, header_digests[file], shard_bytes[file] = read_header(directory / file)
        tensors |= {entry.name: entry for entry in entries}
    if is_decodable(config):
        tensors, config = with_values(tensors, config, str(model)), without_quantization(config)
    wrapper = wrapper_of(config, tensors)
    require_causal(config, str(model))
    config = config if wrapper is None else text_config(config)
    family = row_of(config)
    rename = _renaming(family, config, wrapper)
    named = {rename(name): entry for name, entry in tensors.items()}
    tensors = {name: replace(entry, name=name) for name, entry in named.items() if not _IGNORED.match(name)}
    if family is not None and family.experts is not None:
        layers = range(further_layers(config).start)
        tensors = separated(tensors, family, lambda name: family.layer_of(name) in layers)
    misplaced = {rename(name): file for name, file in weights.weight_map.items() if rename(name) not in named}
    files = ShardFiles(directory)
    found = Checkpoint(
        str(model), directory, config, tensors, header_digests, shard_bytes, stamps, files, wrapper, misplaced
    )
    return settle_head(found)


def _renaming(family: Family | None, config: Mapping[str, Any], wrapper: Wrapper | None) -> Callable[[str], str]:
    """Maps a tensor's name in the files to its name in the pruned class of the family, if that is known."""
    if family is None:
        return str
    inner, further = wrapper.inner if wrapper is not None else family.with_prefix, further_layers(config)

    def rename(name: str) -> str:
        name = inner(name)
        return name if family.layer_of(name) in further else family.canonical(name)

    return rename


def _config_and_weights(where: str, directory: Path, names: Sequence[str]) -> tuple[dict[str, Any], WeightFiles]:
    """Contents of config.json and the files that hold the weights. names: of all files, fetched or not."""
    require_model(where, names, lambda: read_json(directory / "adapter_config.json", "download it again"))
    need = "a model directory needs config.json next to its safetensors shards"
    config = nested(with_layer_count(dense_type(read_json(directory / CONFIG_NAME, need))))
    return config, weight_files_of(where, names, config, lambda name: read_json(directory / name, "download it again"))


def _warn_of_own_code(model: str, config: Mapping[str, Any]) -> None:
    """Warn that the code which comes with a supported model is not used."""
    auto_map, family = config.get("auto_map"), FAMILIES.get(str(config.get("model_type")))
    classes = [value for key, value in auto_map.items() if key != "AutoTokenizer"] if isinstance(auto_map, dict) else []
    if family is not None and classes and not is_pruned(config):
        logger.warning(
            "%s has model code of its own (auto_map: %r), which is not run; transformers' %s is used instead",
            model,
            classes[-1],
            family.causal_class,
        )


def _resolve(model: str, weights: bool) -> Path:
    """The directory of a model; a Hub id is downloaded (or found in the Hub cache) first.

    weights: whether they are needed besides config.json.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        require_model(str(path.parent), [path.name], dict)
    if path.exists():
        raise InvalidModel(f"{model} is a file; name the directory that holds config.json and the safetensors shards")
    if hub.is_path(model):
        raise InvalidModel(f"no such model: {model} is not a directory")

    def choose(directory: Path, names: Sequence[str]) -> tuple[str, ...]:
        return _config_and_weights(model, directory, names)[1].files

    return hub.fetched(model, choose if weights else None)
