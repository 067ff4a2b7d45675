"""Attention in float32 where its gradient in half precision is slow, as on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@contextmanager
def wide_attention(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Within the block, layers in `dtype` on a CPU attend in float32; those on a GPU, or in float32, as they are.

    The backward pass of torch's CPU attention in bfloat16 took twice as long as in float32, a fifth of that of a layer.
    """
    if device != "cpu" or dtype == torch.float32:
        yield
        return
    with _WideAttention():
        yield


class _WideAttention(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **keywords)
        keywords = {name: _wide(value) for name, value in keywords.items()}
        return function(*map(_wide, args), **keywords).to(args[0].dtype)


def _wide(value: Any) -> Any:
    """A tensor of floats in float32; anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
