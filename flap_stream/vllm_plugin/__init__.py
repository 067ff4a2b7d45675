"""vLLM runs pruned checkpoints without the trust flag once this package is installed beside it.

vLLM calls `register` through the entry point group `vllm.general_plugins`; nothing here is imported before.
"""

_FAMILIES = ("Llama", "Ministral", "Mistral", "Qwen2", "Qwen3", "SeedOss")


def register() -> None:
    """Tell vLLM which class runs the architectures that pruned checkpoints name."""
    from vllm import ModelRegistry

    for family in _FAMILIES:
        ModelRegistry.register_model(f"Pruned{family}ForCausalLM", "flap_stream.vllm_plugin.model:PrunedForCausalLM")
