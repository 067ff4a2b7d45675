"""From tokens to the state before the first decoder layer."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from flap_stream.engine.finite import all_finite, refuse_non_finite
from flap_stream.engine.memory import host_buffer
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.outer_model import LayerCall
from flap_stream.model.safetensors_format import TensorEntry, row_ranges

if TYPE_CHECKING:
    from flap_stream.engine.streamed_model import StreamedModel


class Embedding:
    """Embeds batches of at most so many tokens, of which only the rows of words in use are read."""

    def __init__(self, model: "StreamedModel", tokens: int) -> None:
        self._outer = model.skeleton.outer
        self._words = _Rows(model, model.embedding_entry, tokens)
        self._inputs = None if model.input_entry is None else _Rows(model, model.input_entry, tokens)
        self._weights = None if model.skeleton.state.is_plain else model.load(model.outer_entries)

    def first(self, tokens: np.ndarray) -> tuple[torch.Tensor, list[LayerCall]]:
        """See `OuterModel.record`. tokens: int64 `[sample, token]`."""
        inputs = None if self._inputs is None else self._outer.embed_inputs(*self._inputs.read(tokens))
        return self._outer.record(self._outer.embed(*self._words.read(tokens)), self._weights, inputs)


class _Rows:
    """Reads the rows of an embedding `[word, size]` that batches of at most so many tokens ask for."""

    def __init__(self, model: "StreamedModel", entry: TensorEntry, tokens: int) -> None:
        self._model, self._entry, self._row_bytes = model, entry, entry.nbytes // entry.shape[0]
        most = min(tokens, entry.shape[0]) * self._row_bytes
        self._buffer = host_buffer((most,), torch.uint8)  # a new one for each batch costs as much as reading

    def read(self, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows, on a CPU perhaps the buffer itself, and for each token which it is, int64, on the device.

        A word beyond the table has its first row, as in transformers.
        """
        model, entry = self._model, self._entry
        unique, places = np.unique(np.where(tokens < entry.shape[0], tokens, 0), return_inverse=True)
        raw = self._buffer[: len(unique) * self._row_bytes]
        model.checkpoint.read_ranges(entry, list(row_ranges(unique, self._row_bytes)), memoryview(raw.numpy()))
        rows = raw.view(stored_dtype(entry)).view(len(unique), -1).to(model.device, model.dtype)
        refuse_non_finite([] if all(all_finite([rows])) else [entry.name], model.checkpoint.source)
        return rows, torch.from_numpy(places.reshape(tokens.shape)).to(model.device)
