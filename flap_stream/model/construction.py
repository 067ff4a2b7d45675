"""The causal language model of a config.json, built by transformers, without memory for its parameters."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from flap_stream.errors import InvalidModel
from flap_stream.model.architecture import Family, is_pruned
from flap_stream.model.model_code import model_class
from flap_stream.modeling import modeling_flap_stream

_LARGE = 1 << 28  # elements of a tensor that is never made in memory, 1 GiB in float32


def built(config: Mapping[str, Any], family: Family, where: str) -> PreTrainedModel:
    """The causal language model of a config.json, its parameters on the meta device, its buffers real.

    A pruned checkpoint gets the classes of `modeling/`, which give every layer its own size.
    """
    try:
        kind, hf_config = model_class(config)
        with _LargeOnMeta(), init_empty_weights(include_buffers=False), no_init_weights():
            if is_pruned(config):
                skeleton = kind._from_config(hf_config)
            else:
                skeleton = kind.from_config(hf_config)
                if family.experts is not None:
                    modeling_flap_stream.separate_experts(skeleton.get_submodule(family.base_path))
    except Exception as error:  # a wrong value makes transformers raise anything, ZeroDivisionError included
        reason = " ".join(str(error).split())
        raise InvalidModel(f"transformers cannot build a model from {where}/config.json: {reason}") from error
    skeleton.tie_weights()
    return skeleton.eval().requires_grad_(False)


class _LargeOnMeta(TorchFunctionMode):
    """Makes large empty tensors on the meta device at once: those of all experts may be more than a machine has."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("device") is None and _elements(args) >= _LARGE:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def _elements(sizes: Sequence[Any]) -> int:
    """Of a tensor of these sizes, given one by one or as one argument."""
    return prod(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
