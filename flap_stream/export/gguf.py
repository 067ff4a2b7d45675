"""A checkpoint as a GGUF file for llama.cpp, written tensor by tensor.

Layers that compute what Llama's do become architecture `deci`, which allows biases and a size for each layer, or
`llama` if all layers have one size; other scalings of a family are folded into its weights. Layers with query and key
norms become `qwen3`, which allows neither.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream.config import EngineConfig, ExportGgufConfig
from flap_stream.config.rules import options_of
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidInput, OutputConflict, UnsupportedModel
from flap_stream.export.gguf_architecture import llama_cpp_architecture
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.hub import base_name
from flap_stream.model.opening import open_checkpoint
from flap_stream.output.destination import require_space
from flap_stream.progress import Progress
from flap_stream.storage import files, places

try:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
except ImportError as error:
    raise InvalidInput("export-gguf needs the package gguf; install it with pip install 'flap-stream[gguf]'") from error

from flap_stream.export.gguf_tensors import QUANTISED_BLOCK, GgufTensor, gguf_tensors, raw_bytes
from flap_stream.export.gguf_vocabulary import add_vocabulary

logger = logging.getLogger(__name__)

_FILE_TYPES = {
    "f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "q5_1": ("Q5_1", "MOSTLY_Q5_1"), "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"), "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}  # fmt: skip
_OWN_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_MOST_LINES = 10  # of progress, where there is no bar; a model has hundreds of tensors


@dataclass(frozen=True)
class ExportGgufResult:
    """A GGUF file that was written. unquantised: matrices that stayed f16 because their rows do not fill blocks."""

    file: Path
    architecture: str
    type: str
    tensors: int
    nbytes: int
    unquantised: int


def export_gguf(
    model: str | Path,
    file: str | Path,
    options: ExportGgufConfig | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> ExportGgufResult:
    """Write a pruned (or dense) checkpoint into a GGUF file.

    keywords: the fields of `ExportGgufConfig`, in place of `options`. progress: True shows it on stderr.
    Raises UnsupportedModel, naming the reason and what to do instead, for what llama.cpp cannot represent,
    OutputConflict if `file` exists, InsufficientSpace if the disk has too little room.
    """
    options = options_of(ExportGgufConfig, "export_gguf", options, keywords)
    file, progress = Path(file), Progress.of(progress)
    places.require_name(file)
    if file.exists():
        raise OutputConflict(f"{file} exists already; name another FILE or move it away")
    places.require_place(file)
    with open_checkpoint(model) as source:
        if source.wrapper is not None:
            raise UnsupportedModel(f"{model} is a multimodal model; only language models by themselves are exported")
        streamed = StreamedModel(source, EngineConfig(device="cpu"))
        architecture = llama_cpp_architecture(streamed)
        written = options.type or _OWN_TYPES[next(iter(streamed.layer_entries[0].values())).dtype]
        tensors = list(gguf_tensors(streamed, architecture, GGMLQuantizationType[_FILE_TYPES[written][0]]))
        nbytes = sum(tensor.nbytes for tensor in tensors)
        require_space(file, nbytes)
        writer = GGUFWriter(None, architecture)
        _add_sizes(writer, streamed, architecture)
        writer.add_name(base_name(source.source))
        writer.add_file_type(LlamaFileType[_FILE_TYPES[written][1]])
        writer.add_quantization_version(2)
        add_vocabulary(writer, source.directory, streamed.vocab_size, options.tokenizer_pre)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.raw_shape, np.dtype(np.uint8), tensor.nbytes, tensor.type)
        _write(writer, source, tensors, file, progress)
    unquantised = _warn_of_unquantised(tensors) if written.startswith("q") else 0
    return ExportGgufResult(file, architecture, written, len(tensors), nbytes, unquantised)


def _warn_of_unquantised(tensors: Sequence[GgufTensor]) -> int:
    """How many matrices of a quantised file stay f16, which is said if there are any."""
    count = sum(len(tensor.shape) == 2 and tensor.type == GGMLQuantizationType.F16 for tensor in tensors)
    if count:
        logger.warning(
            "%d matrices stay f16 because their rows are not a multiple of %d; prune with --round-neurons-to %d",
            count,
            QUANTISED_BLOCK,
            QUANTISED_BLOCK,
        )
    return count


def _add_sizes(writer: GGUFWriter, model: StreamedModel, architecture: str) -> None:
    config, shapes = model.skeleton.hf_config, model.shapes
    length, window = config.max_position_embeddings, _window(config)
    if window is not None and window < length:
        logger.warning(
            "llama.cpp has no sliding window in this architecture; the context length becomes its %d tokens",
            window,
        )
        length = window
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(len(shapes))
    heads = [shape.kv_groups * shape.heads_per_group for shape in shapes]
    groups, neurons = [shape.kv_groups for shape in shapes], [shape.neurons for shape in shapes]
    has_lists = architecture == "deci"
    writer.add_head_count(heads if has_lists else heads[0])
    writer.add_head_count_kv(groups if has_lists else groups[0])
    writer.add_feed_forward_length(neurons if has_lists else neurons[0])
    writer.add_key_length(shapes[0].head_dim)
    writer.add_value_length(shapes[0].head_dim)
    writer.add_rope_dimension_count(shapes[0].head_dim)
    writer.add_rope_freq_base(model.skeleton.rotary().base)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _window(config: Any) -> int | None:
    """Tokens that a layer with a sliding window attends to; None if no layer has one."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    return None if types and all(t == "full_attention" for t in types) else window


def _write(
    writer: GGUFWriter, source: Checkpoint, tensors: Sequence[GgufTensor], file: Path, progress: Progress
) -> None:
    temporary = files.partial_path(file)
    files.make_directory(file.absolute().parent)
    try:
        files.open_new(temporary).close()  # otherwise an existing link would be followed
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.stage("export", len(tensors), unit="tensor", most_lines=_MOST_LINES) as stage:
            for tensor in tensors:
                raw = raw_bytes(source, tensor)
                writer.write_tensor_data(raw)
                stage.advance(bytes_moved=raw.nbytes)
        writer.flush()
        assert writer.fout is not None
        os.fsync(writer.fout[0].fileno())
        writer.close()
        files.commit_rename(temporary, file)
    except BaseException:
        files.remove(temporary)
        raise
