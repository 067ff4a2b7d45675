"""The torch dtypes of a checkpoint's tensors."""

import torch

from flap_stream.model.safetensors_format import FORWARD_DTYPES, TensorEntry

_RAW_DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64},
    **{"U8": torch.uint8, "I8": torch.int8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}


def stored_dtype(entry: TensorEntry) -> torch.dtype:
    """The dtype of a tensor, decoded if it is encoded, which must be one of FORWARD_DTYPES."""
    return torch_dtype(entry.dtype)


def torch_dtype(code: str) -> torch.dtype:
    """The dtype that safetensors calls `code`, one of FORWARD_DTYPES."""
    return getattr(torch, FORWARD_DTYPES[code])


def raw_view(raw: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Bytes of a stored tensor, uint8 `[byte]`, as what they are: of all of its rows, or of some."""
    values = raw.view(_RAW_DTYPES[entry.dtype])
    return values.view(-1, *entry.shape[1:]) if entry.shape else values[0]
