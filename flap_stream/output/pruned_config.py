"""The config.json of a pruned checkpoint: the dense one, with each layer's sizes and the classes that read them."""

from typing import Any

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.model.architecture import PRUNED_TYPE
from flap_stream.model.model_code import MODELING_NAME
from flap_stream.output.pruned_model import PrunedModel


def pruned_config(pruned: PrunedModel) -> dict[str, Any]:
    """The contents of config.json.

    The global sizes are still the dense ones, which pass validation everywhere. The model_type is one of our own, so
    that loading without remote code asks for it.
    """
    source = pruned.source
    if source.wrapper is not None:
        whole = source.wrapper.config
        sizes = _with_layer_sizes(whole["text_config"], pruned)  # whose layers all stay
        return {**whole, **_classes(whole, wrapper_classes(whole)), "text_config": sizes}
    sizes = _with_layer_sizes(source.config if pruned.config is None else pruned.config, pruned)
    return {**sizes, **_classes(source.config, pruned.family.pruned_classes)}


def wrapper_classes(config: dict[str, Any]) -> dict[str, str]:
    """Auto class to the class in `modeling/` of a multimodal model.

    There is no entry for the model without its head: transformers would not find the tensors under another class's
    names.
    """
    name = str(config["architectures"][0]).removeprefix("Pruned")
    return {"AutoModelForImageTextToText": f"Pruned{name}"}


def _classes(config: dict[str, Any], classes: dict[str, str]) -> dict[str, Any]:
    """The keys of config.json that name the classes to load. classes: auto class to the model class in `modeling/`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    *_, architecture = classes.values()
    classes = {"AutoConfig": f"Pruned{CONFIG_MAPPING[config['model_type']].__name__}", **classes}
    module = MODELING_NAME.removesuffix(".py")
    return {
        "model_type": PRUNED_TYPE + config["model_type"],
        "architectures": [architecture],
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
    }


def _with_layer_sizes(config: dict[str, Any], pruned: PrunedModel) -> dict[str, Any]:
    """A language model's config with each layer's own sizes."""
    experts = [_expert_sizes(shape, keep) for shape, keep in pruned.kept]
    return {
        **config,
        **_own_sizes(pruned),
        **({"pruned_expert_sizes": experts} if pruned.family.experts else {}),
        "pruned_output_bias": pruned.restore != "none" or config.get("pruned_output_bias", False),
    }


def _own_sizes(pruned: PrunedModel) -> dict[str, Any]:
    """Each layer's sizes.

    Where attention is whole, a plain list: programs that ask a config for its layers' sizes then find the dense
    model's attention, and vLLM runs latent attention only if they do not vary.
    """
    if not pruned.family.prunes(Sublayer.ATTENTION):
        return {"attention_is_whole": True, "pruned_neurons": [len(keep.neurons) for _, keep in pruned.kept]}
    layers = {str(i): _layer_sizes(shape, keep) for i, (shape, keep) in enumerate(pruned.kept)}
    return {
        "head_dim": pruned.shapes[0].head_dim,
        "per_layer_config": layers,
        "allow_global_per_layer_attribute_access": True,
    }


def _layer_sizes(shape: LayerShape, keep: LayerKeep) -> dict[str, int]:
    groups = len(keep.kv_groups)
    sizes = {"num_attention_heads": groups * shape.heads_per_group, "num_key_value_heads": groups}
    return sizes if shape.experts else {**sizes, "intermediate_size": len(keep.neurons)}


def _expert_sizes(shape: LayerShape, keep: LayerKeep) -> list[int]:
    """Neurons kept in each expert of a layer that keeps any; none for a dense MLP."""
    return [size for size in shape.expert_sizes(keep.neurons).tolist() if size]
