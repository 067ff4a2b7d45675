"""A GGUF file in the real llama.cpp, through its Python binding, in float32 wherever it can."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import llama_cpp
import numpy as np

_F32 = 0  # of ggml_type, for the cache of keys and values


@contextmanager
def llama_model(path: Path, tokens: int = 128) -> Iterator[llama_cpp.Llama]:
    """The model with room for that many tokens."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_repacking() -> llama_cpp.llama_cpp.llama_model_params:
        parameters = defaults()  # the binding has no argument for this one
        parameters.use_extra_bufts = False  # quantised weights repacked for AMX crash on processors without it
        return parameters

    with patch.object(llama_cpp.llama_cpp, "llama_model_default_params", without_repacking):
        model = llama_cpp.Llama(
            str(path), n_ctx=tokens, logits_all=True, n_threads=1, type_k=_F32, type_v=_F32, verbose=False
        )
    try:
        yield model
    finally:
        model.close()


def logits(model: llama_cpp.Llama, ids: np.ndarray) -> np.ndarray:
    """Logits `[token, vocabulary]` after each token of one text."""
    model.reset()
    model.eval(ids.tolist())
    return np.array(model.scores[: len(ids)])


def greedy(model: llama_cpp.Llama, ids: np.ndarray, steps: int) -> list[int]:
    """The most likely next tokens, each fed back."""
    model.reset()
    model.eval(ids.tolist())
    chosen: list[int] = []
    for _ in range(steps):
        chosen.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(chosen[-1:])
    return chosen
