"""The torch dtypes of a checkpoint's tensors."""

import torch

from flap_stream.model.safetensors_format import FORWARD_DTYPES, TensorEntry


def stored_dtype(entry: TensorEntry) -> torch.dtype:
    """The dtype of a tensor in its file, which must be one of FORWARD_DTYPES."""
    return torch_dtype(entry.dtype)


def torch_dtype(code: str) -> torch.dtype:
    """The dtype that safetensors calls `code`, one of FORWARD_DTYPES."""
    return getattr(torch, FORWARD_DTYPES[code])
