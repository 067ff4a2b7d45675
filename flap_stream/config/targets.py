"""Targets in place of a ratio: what the pruned model may have at most, from which the ratio follows."""

from dataclasses import dataclass, fields

from flap_stream.config.options import Options, require_at_least
from flap_stream.config.values import Parameters, Size, Tokens, option_name
from flap_stream.errors import InvalidOption

TARGETS = ("target_parameters", "target_size", "target_memory")


class NotGiven(float):
    """A default value, which can be told from the same number given by the user."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TargetConfig(Options):
    """What the pruned model may have at most.

    target_parameters: parameters, added biases included. target_size: bytes of all weight files. target_memory: bytes
    of the weights and of the KV cache of `batch` (1) texts of `context` tokens, in the checkpoint's dtype; layers with
    a sliding window count as if they kept all of it.
    """

    target_parameters: Parameters | None = None
    target_size: Size | None = None
    target_memory: Size | None = None
    context: Tokens | None = None
    batch: int | None = None

    @property
    def target(self) -> str | None:
        """The field of the target in force; None if there is none."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    def __post_init__(self) -> None:
        """Refuse values out of range, several targets at once, and a cache without a target for memory."""
        super().__post_init__()
        given = [f"--{option_name(name)}" for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidOption(f"{' and '.join(given)} were given together; only one target can be met, so choose one")
        for field in fields(TargetConfig):
            if (value := getattr(self, field.name)) is not None:
                require_at_least(option_name(field.name), value, 1)
                if self.target_memory is None and field.name not in TARGETS:
                    raise InvalidOption(
                        f"--{field.name} {value} would have no effect: it is only valid with --target-memory SIZE"
                    )
        if self.target_memory is not None:
            if self.context is None:
                raise InvalidOption(
                    "--target-memory needs --context TOKENS, for which memory for the KV cache is counted"
                )
            object.__setattr__(self, "batch", self.batch or 1)


TARGET_FIELDS = tuple(field.name for field in fields(TargetConfig))
