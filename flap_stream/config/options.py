"""What all configs are made of: choices, checks, and dataclasses that convert and check their own values."""

import re
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from flap_stream.config.values import Dtype, Size, converted
from flap_stream.errors import InvalidOption

METRICS = ("wifv", "ifv", "wifn", "fisher")
STRUCTURES = ("al-am", "al-mm", "ul-mm", "ul-um")
METHODS = ("flap", "wanda-sp", "magnitude-sp", "reap", "shortgpt")
HEAD_SCORES = ("mean-z", "l2")
STATISTICS = ("exact", "released")
RESTORATIONS = ("bias", "none", "least-squares", "reconstruct")
REFITS = ("least-squares", "reconstruct")  # those for which layers are run again
SWEPT_RESTORATIONS = ("bias", "none")  # those that masked_layers.py can put into a dense layer
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BOS = CHAT_TEMPLATE = ("auto", "always", "never")
DTYPES = ("auto", "bfloat16", "float16", "float32")
OUTPUT_DTYPES = ("auto", "fp8")

LOSS_WINDOWS = 256  # windows that `prune` differentiates for the metric fisher unless told otherwise
# In fp16 and bf16 that is 16 bytes, which a GPU's matrix units need; larger multiples gained nothing on an H200.
FAST_MULTIPLE = 8
FP8_BLOCK = 128  # rows and columns of a matrix in FP8 that share a scale, as kernels expect it

_Part = TypeVar("_Part")


def require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InvalidOption for a value that is not among the choices. option: without its dashes."""
    if value not in choices:
        raise InvalidOption(f"--{option} {value!r} is unknown; choose one of {', '.join(choices)}")


def removes_experts(options: Any) -> bool:
    """Whether experts are removed as a whole."""
    return bool(options.whole_experts) or options.method == "reap"


def removes_layers(options: Any) -> bool:
    """Whether layers are removed as a whole."""
    return bool(options.depth) or options.method == "shortgpt"


def require_at_least(option: str, value: int, least: int) -> None:
    """Raise InvalidOption for a value below the least."""
    if value < least:
        raise InvalidOption(f"--{option} is {value}; it must be at least {least}")


def require_ratio(ratio: float, option: str = "ratio") -> None:
    """Raise InvalidOption for a ratio that is not between 0 and 1."""
    if not 0 < ratio < 1:
        raise InvalidOption(f"--{option} is {ratio}; it must lie between 0 and 1, both excluded, such as 0.2 or 20%")


@dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """The base of all configs: converts every value to the type of its field. It ends the chain of `__post_init__`."""

    def __post_init__(self) -> None:
        """Bring every value to the type of its field; InvalidOption if it cannot be."""
        for field in fields(self):
            object.__setattr__(self, field.name, converted(type(self), field.name, getattr(self, field.name)))

    def __repr__(self) -> str:
        """The options that are not at their default."""
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in changed_options(self).items())})"


def changed_options(options: Any) -> dict[str, Any]:
    """Fields of a config that are not as they are by default, with their values."""
    default = type(options)()  # its fields have the values that None stands for
    names = [field.name for field in fields(options)]
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(default, name)}


def part_of(config: Any, kind: type[_Part], **changes: Any) -> _Part:
    """The fields of `config` that dataclass `kind` has, as a `kind`, with some of them changed."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    own = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return kind(**{**own, **changes})


@dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig(Options):
    """How decoder layers are run.

    device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
    dtype: of the forward; `auto` is the checkpoint's.
    batch_size: windows that run through a layer at once; None lets the placement choose.
    device_memory, host_memory: most bytes to use; None is what is free, minus a margin.
    prefetch: layers to read ahead (0 or 1); None lets the placement choose.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | None = None
    device_memory: Size | None = None
    host_memory: Size | None = None
    prefetch: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        require_choice("dtype", self.dtype, DTYPES)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InvalidOption(f"--device {self.device!r} is unknown; write auto, cpu, cuda or cuda:N")
        if self.batch_size is not None:
            require_at_least("batch-size", self.batch_size, 1)
        for name, nbytes in (("host-memory", self.host_memory), ("device-memory", self.device_memory)):
            if nbytes is not None:
                require_at_least(name, nbytes, 1)
        if self.prefetch not in (None, 0, 1):
            raise InvalidOption(f"--prefetch is {self.prefetch}; it must be 0 or 1")


@dataclass(frozen=True, kw_only=True, repr=False)
class TextConfig(Options):
    """How text becomes windows of tokens.

    bos: begin every window with the model's beginning-of-text token: `auto` where its tokenizer puts one before a text.
    text_column: of files with rows; None is `text`, else `content`, else conversations, else the only one of strings.
    chat_template: put conversations (`messages`) through the tokenizer's template: `auto` where there is no text,
    `always` where there is, too.
    """

    bos: str = "auto"
    text_column: str | None = None
    chat_template: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        require_choice("bos", self.bos, BOS)
        require_choice("chat-template", self.chat_template, CHAT_TEMPLATE)

    def _have_released_windows(self) -> None:
        """Use the released code's windows, which have no beginning-of-text token added."""
        if self.bos == "always":
            raise InvalidOption("--statistics released uses the released code's windows, which --bos always alters")
        object.__setattr__(self, "bos", "never")
