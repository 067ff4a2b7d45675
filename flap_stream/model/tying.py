"""Whether a checkpoint's head is tied to its embedding: its tensors decide, as in transformers."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import FAMILIES
from flap_stream.model.safetensors_format import TensorEntry

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 23  # not measured


def settle_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, made consistent: its `tie_word_embeddings` and its tensors agree.

    Where the config ties the two, and
    - the files hold a head of other values, the two are untied;
    - they hold the same values twice, the second copy is dropped;
    - they hold only the head, it becomes the embedding.
    Source: tie_weights of transformers' PreTrainedModel.
    """
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    if family is None:
        return checkpoint
    embedding, head = (checkpoint.tensors.get(name) for name in (family.embedding, family.head))
    if head is None or not _ties(checkpoint.config):
        return checkpoint
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if name != family.head}
    if embedding is None:
        return replace(checkpoint, tensors=tensors | {family.embedding: replace(head, name=family.embedding)})
    if _is_same(checkpoint, embedding, head):
        return replace(checkpoint, tensors=tensors)
    logger.warning(
        "%s has tie_word_embeddings true, but a head (%s) that is not its embedding; they are kept separate, as in "
        "transformers",
        checkpoint.source,
        family.head,
    )
    return _untied(checkpoint)


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether the config ties them; its class in transformers decides where it does not say."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return False  # a family newer than transformers here, which refuses to build it
    return bool(CONFIG_MAPPING[config["model_type"]]().tie_word_embeddings)


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    apart, wrapper = {"tie_word_embeddings": False}, checkpoint.wrapper
    if wrapper is not None:
        text = {**wrapper.config["text_config"], **apart}
        wrapper = replace(wrapper, config={**wrapper.config, **apart, "text_config": text})
    return replace(checkpoint, config={**checkpoint.config, **apart}, wrapper=wrapper)


def _is_same(checkpoint: Checkpoint, one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors have the same bytes; reading stops at the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_blocks(checkpoint, one), _blocks(checkpoint, other), strict=True))


def _blocks(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[bytearray]:
    for start in range(0, entry.nbytes, _BLOCK_BYTES):
        block = bytearray(min(_BLOCK_BYTES, entry.nbytes - start))
        checkpoint.read_into(entry, memoryview(block), start)
        yield block
