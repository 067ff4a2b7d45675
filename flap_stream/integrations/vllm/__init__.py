"""vLLM runs pruned checkpoints without --trust-remote-code when this package is installed in its environment.

vLLM calls `register` through the entry point group `vllm.general_plugins`; nothing here is imported before that.
"""


def register() -> None:
    """Register the architectures of pruned checkpoints with vLLM, and their configs with transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm import ModelRegistry

    from flap_stream.model.architecture import PRUNED_TYPE
    from flap_stream.model.families import COMPUTE_AS_LLAMA, FAMILIES
    from flap_stream.modeling import modeling_flap_stream

    for name in (*COMPUTE_AS_LLAMA, "qwen3"):
        config = getattr(modeling_flap_stream, f"Pruned{CONFIG_MAPPING[name].__name__}")
        CONFIG_MAPPING.register(PRUNED_TYPE + name, config, exist_ok=True)
        architecture = FAMILIES[name].pruned_classes["AutoModelForCausalLM"]
        ModelRegistry.register_model(architecture, "flap_stream.integrations.vllm.model:PrunedForCausalLM")
