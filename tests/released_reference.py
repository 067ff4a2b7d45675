"""A plain sequential transcription of what the released FLAP code computes, item by item of its recurrences.

From CASIA-IVA-Lab/FLAP: lib/layerwrapper.py (BiasGPT, WrappedGPT) and lib/prune.py (prune_flap, prune_wanda_sp,
prune_magnitude_sp, compress). Whole model in memory, one window at a time, multi-head attention; what is written into
that code for LLaMA-7B (head size 128, 32 layers) is taken from the config instead.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass
class ReleasedDecision:
    """Masks (True survives) and biases of every layer; float32 tensors."""

    attention: list[torch.Tensor]
    mlp: list[torch.Tensor]
    attention_bias: list[torch.Tensor]
    mlp_bias: list[torch.Tensor]


class _BiasGPT:
    def __init__(self, channels: int) -> None:
        self.nsamples = 0
        self.baseline_inp = torch.zeros(channels)
        self.scaler_inp = torch.zeros(channels)
        self.fluc_inp = torch.zeros(channels)

    def add_batch(self, inp: torch.Tensor) -> None:
        batch_size = inp.shape[0]
        inp = inp.reshape(-1, inp.shape[-1]).t()
        old_baseline_inp = self.baseline_inp  # an alias, as in the original: the next two lines update it in place
        self.baseline_inp *= self.nsamples / (self.nsamples + batch_size)
        self.baseline_inp += torch.mean(inp, dim=1) / (self.nsamples + batch_size)
        self.scaler_inp *= self.nsamples / (self.nsamples + batch_size)
        self.scaler_inp += torch.norm(inp, p=2, dim=1) ** 2 / (self.nsamples + batch_size)
        if self.nsamples == 0:
            self.fluc_inp = torch.zeros_like(self.baseline_inp)
        else:
            self.fluc_inp *= (self.nsamples - 1) / (self.nsamples + batch_size - 1)
            deviations = (inp - self.baseline_inp.unsqueeze(1)) * (inp - old_baseline_inp.unsqueeze(1))
            self.fluc_inp += torch.sum(deviations, dim=1) / (self.nsamples + batch_size)
        self.nsamples += batch_size


def _metric(wrapped: _BiasGPT, weight: torch.Tensor, name: str) -> torch.Tensor:
    if name == "ifv":
        return wrapped.fluc_inp
    if name == "wifv":
        return wrapped.fluc_inp * torch.sum(weight.pow(2), dim=0)
    return (torch.abs(weight) * torch.sqrt(wrapped.scaler_inp.reshape((1, -1)))).mean(dim=0)


def _inputs_of(model: Any, module: nn.Module, tokens: np.ndarray) -> list[torch.Tensor]:
    """The module's input for every window in turn, [1, token, channel]."""
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for window in tokens:
            model(input_ids=torch.from_numpy(window)[None], use_cache=False)
    handle.remove()
    return inputs


def _neurons_to_remove(config: Any, ratio: float, remove_heads: int, per_layer: bool) -> int:
    inner, hidden, layers = config.intermediate_size, config.hidden_size, config.num_hidden_layers
    head_dim = hidden // config.num_attention_heads
    if per_layer:
        remove_params = ratio * (inner * hidden * 3 + hidden * hidden * 4)
        remove_head_params = hidden * 4 * (remove_heads // layers) * head_dim
    else:
        remove_params = layers * ratio * (inner * hidden * 3 + hidden * hidden * 4)
        remove_head_params = hidden * 4 * remove_heads * head_dim
    return int((remove_params - remove_head_params) / (hidden * 3))


def released_statistics(model: Any, tokens: np.ndarray) -> list[dict[str, _BiasGPT]]:
    """What prune_flap accumulates of each layer of a float32 multi-head model; tokens int64 [sample, token]."""
    found = []
    for layer in model.model.layers:
        wrapped = {}
        for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            wrapped[name] = _BiasGPT(module.weight.shape[1])
            for inputs in _inputs_of(model, module, tokens):
                wrapped[name].add_batch(inputs)
        found.append(wrapped)
    return found


def released_flap(
    model: Any,
    statistics: list[dict[str, _BiasGPT]],
    ratio: float,
    structure: str = "al-am",
    metric: str = "wifv",
    remove_heads: int = 0,
) -> ReleasedDecision:
    """prune_flap's masks and biases, from what it has accumulated."""
    config = model.config
    layers = model.model.layers
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attn_metrics, mlp_metrics, attn_baselines, mlp_baselines = [], [], [], []
    attn_mask, mlp_mask = [], []
    for layer, wrapped in zip(layers, statistics, strict=True):
        w_attn = _metric(wrapped["o"], layer.self_attn.o_proj.weight.data, metric) ** 2
        w_mlp = _metric(wrapped["down"], layer.mlp.down_proj.weight.data, metric)
        attn_baselines.append(wrapped["o"].baseline_inp.half())
        mlp_baselines.append(wrapped["down"].baseline_inp.half())
        if structure in ("ul-um", "ul-mm"):
            per_head = w_attn.reshape(-1, head_dim).sum(dim=1)
            if structure == "ul-um":
                attn_at, mlp_at = int(ratio * heads), int(w_mlp.numel() * ratio)
            else:
                attn_at = remove_heads // len(layers)
                mlp_at = _neurons_to_remove(config, ratio, remove_heads, per_layer=True)
            attn_mask.append(per_head >= torch.sort(per_head)[0][attn_at])
            mlp_mask.append(w_mlp >= torch.sort(w_mlp)[0][mlp_at])
        attn_metrics.append(w_attn)
        mlp_metrics.append(w_mlp)

    def standardise(x: torch.Tensor) -> torch.Tensor:
        return (x - torch.mean(x, dim=1, keepdim=True)) / torch.std(x, dim=1, keepdim=True)

    if structure in ("al-mm", "al-am"):
        attn = standardise(torch.stack(attn_metrics)).reshape(len(layers), -1, head_dim).mean(dim=2)
        mlp = standardise(torch.stack(mlp_metrics))
        if structure == "al-mm":
            attn_threshold = torch.sort(attn.view(-1), descending=True)[0][-int(remove_heads)]
            neurons = _neurons_to_remove(config, ratio, remove_heads, per_layer=False)
            mlp_threshold = torch.sort(mlp.view(-1), descending=True)[0][-neurons]
        else:
            both = torch.cat([attn.view(-1), mlp.view(-1)])
            ordered, indices = torch.sort(both, descending=True)
            weight = torch.ones_like(indices)
            weight[indices < attn.numel()] = int(4.0 * head_dim / 3)  # 512.0 / 3, truncated by the int64 tensor
            distance = torch.abs(torch.cumsum(weight, 0) - torch.sum(weight) * (1 - ratio))
            attn_threshold = mlp_threshold = ordered[torch.argmin(distance)]
        attn_mask, mlp_mask = list(attn > attn_threshold), list(mlp > mlp_threshold)

    attention_bias, mlp_bias = [], []
    for layer, keep_heads, keep_neurons, attn_mean, mlp_mean in zip(
        layers, attn_mask, mlp_mask, attn_baselines, mlp_baselines, strict=True
    ):
        channels = keep_heads.repeat_interleave(head_dim)
        attention_bias.append((attn_mean * ~channels).float() @ layer.self_attn.o_proj.weight.data.T)
        mlp_bias.append((mlp_mean * ~keep_neurons).float() @ layer.mlp.down_proj.weight.data.T)
    return ReleasedDecision(attn_mask, mlp_mask, attention_bias, mlp_bias)


def released_baseline(
    model: Any, tokens: np.ndarray | None, ratio: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Masks of prune_wanda_sp (with tokens; changes the model's weights) or prune_magnitude_sp (tokens None)."""
    config = model.config
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attention, mlp = [], []
    for layer in model.model.layers:
        scores = {}
        for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            weight = module.weight.data
            if tokens is None:
                scores[name] = torch.norm(weight, dim=0)
                continue
            scaler_row = torch.zeros(weight.shape[1])
            for nsamples, inputs in enumerate(_inputs_of(model, module, tokens)):
                scaler_row *= nsamples / (nsamples + 1)
                scaler_row += torch.norm(inputs[0].t(), p=2, dim=1) ** 2 / (nsamples + 1)
            scores[name] = (torch.abs(weight) * torch.sqrt(scaler_row.reshape((1, -1)))).mean(dim=0)
        per_head = scores["o"].reshape(-1, head_dim).sum(dim=1)
        keep_heads = per_head >= torch.sort(per_head)[0][int(ratio * heads)]
        keep_neurons = scores["down"] >= torch.sort(scores["down"])[0][int(scores["down"].numel() * ratio)]
        attention.append(keep_heads)
        mlp.append(keep_neurons)
        if tokens is not None:  # the pruned layer feeds the next: what is removed contributes nothing
            layer.self_attn.o_proj.weight.data *= keep_heads.repeat_interleave(head_dim)
            layer.mlp.down_proj.weight.data *= keep_neurons
    return attention, mlp
