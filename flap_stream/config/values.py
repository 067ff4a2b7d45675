"""Parsing of option values, the same for Python and the command line."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from flap_stream.errors import InvalidOption

Size = Annotated[int, "size"]  # bytes; `8GiB`, too
Parameters = Annotated[int, "parameters"]  # `5B`, too
Tokens = Annotated[int, "tokens"]  # `32k`, too, which is 32768
Folder = Annotated[str, "path"]  # a Path, too
Share = Annotated[float, "share"]  # `20%`, too
Ratios = Annotated[tuple[float, ...], "ratios"]  # `0.1:0.6:0.1`, too
Dtype = Annotated[str, "dtype"]  # `bf16` and torch.bfloat16, too
GgufType = Annotated[str, "gguf"]  # as `dtype`, by its short name; in capitals, too

_MOST_RATIOS = 1000
_MOST_DIGITS = 400  # before or after the point: of any number that a float may be
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# A single letter is a power of 1024, as it is to Docker, Slurm, systemd and the GNU tools.
_SIZE_UNITS |= {f"{letter}{rest}": 1 << 10 * i for i, letter in enumerate("KMGT", start=1) for rest in ("", "IB")}
_PARAMETER_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKEN_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}
_DTYPE_NAMES |= {"fp32": "float32", "f32": "float32", "float": "float32"}
_GGUF_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_OPTION_NAMES = {"max_shard_bytes": "max-shard-size"}
_LONGEST = 80


def option_name(field: str) -> str:
    """What the command line calls a field of a config, without the dashes in front."""
    return _OPTION_NAMES.get(field, field.replace("_", "-"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for the end of a message about an unknown name; empty if no known one is similar."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_size(text: str, option: str = "") -> int:
    """Bytes in a size such as `5GB` (10^9), `20GiB` or `20G` (2^30). option: whose value it is, for the message.

    Raises InvalidOption if the text is not a positive size.
    """
    return _read("size", text, option)


def parse_ratios(text: str) -> tuple[float, ...]:
    """Ratios in `0.2,0.3,50%` or, both ends included, `0.1:0.6:0.1` (start:stop:step); ascending, each once.

    Raises InvalidOption if the text is neither.
    """
    return _read("ratios", text, "ratios")


def parse_count(text: str) -> int:
    """A whole number, also written as `1e3`. Raises InvalidOption for anything else."""
    return _read(int, text)


def dtype_name(text: str) -> str:
    """The long name of a dtype: `bf16` is `bfloat16`; any other text is returned unchanged."""
    return _DTYPE_NAMES.get(text.lower(), text)


def gguf_type(text: str) -> str:
    """The name of a type of GGUF: `fp16` is `f16`, `Q8_0` is `q8_0`; any other text is returned unchanged."""
    return _GGUF_NAMES.get(dtype_name(text), text.lower())


def converted(owner: type, field: str, value: Any) -> Any:
    """`value` converted to the annotated type of a field of the dataclass `owner`; unchanged if that has no reader.

    Raises InvalidOption, naming the option, what was given and what was expected.
    """
    hint = _hints(owner)[field]
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not NoneType)
    kind = get_args(hint)[1] if get_origin(hint) is Annotated else hint
    return _read(kind, value, option_name(field)) if kind in _READERS else value


def _read(kind: Any, value: Any, option: str | None = None) -> Any:
    read, complaint = _READERS[kind]
    found = read(value)
    if found is None:
        raise InvalidOption(f"{f'--{option} ' if option else ''}{shortened(value)} {complaint}")
    return found


def shortened(value: object) -> str:
    """A value for a message: strings in quotes, others with their type, both truncated if long."""
    if isinstance(value, str | bool | NoneType):
        text = repr(value)
    elif isinstance(value, Real):
        text = str(value)
    else:
        text = f"{value!r} ({type(value).__name__})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def written(value: object) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(written, value))
    return "not given" if value is None else str(value).removeprefix("torch.")


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


# --- readers: the value, or None if it cannot be read as such ---


def _decimal(value: object) -> Decimal | None:
    """A finite number, given as one or as a string."""
    if isinstance(value, bool) or not isinstance(value, str | Real | Decimal):
        return None
    try:
        number = Decimal(value.strip() if isinstance(value, str) else repr(float(value)))
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number.adjusted()) < _MOST_DIGITS else None


def _read_count(value: object) -> int | None:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    number = _decimal(value)
    return int(number) if number is not None and abs(number) < 2**63 and number == int(number) else None


def _read_number(value: object) -> float | None:
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)  # whether infinity is in range is for the config to say
    number = _decimal(value)
    return None if number is None else float(number)


def read_share(value: object) -> float | None:
    """A share, given as a number or as text such as `0.2` or `20%`; None if it is neither."""
    if not isinstance(value, str):
        return _read_number(value)
    match = re.fullmatch(r"\s*(.*?)\s*(%?)\s*", value, flags=re.DOTALL)
    number = _decimal(match[1]) if match else None
    return None if number is None or match is None else float(number / (100 if match[2] else 1))


def _read_size(value: object) -> int | None:
    return _read_with_unit(value, _SIZE_UNITS)


def _read_parameters(value: object) -> int | None:
    return _read_with_unit(value, _PARAMETER_UNITS)


def _read_tokens(value: object) -> int | None:
    return _read_with_unit(value, _TOKEN_UNITS)


def _read_with_unit(value: object, units: Mapping[str, int]) -> int | None:
    if not isinstance(value, str):
        return _read_count(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-z]*)\s*", value, flags=re.IGNORECASE)
    if match is None or match[2].upper() not in units:
        return None
    return int(Decimal(match[1]) * units[match[2].upper()]) or None


def _read_bool(value: object) -> bool | None:
    return bool(value) if isinstance(value, bool) or type(value).__name__ == "bool" else None  # numpy's, too


def _read_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else None  # a dtype or a device


def _read_dtype(value: object) -> str | None:
    text = _read_text(value)
    return None if text is None else dtype_name(text.removeprefix("torch."))


def _read_gguf_type(value: object) -> str | None:
    text = _read_text(value)
    return None if text is None else gguf_type(text)


def _read_path(value: object) -> str | None:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    return path if isinstance(path, str) and path else None  # an empty one would be the working directory


def _read_several(value: object, read: Callable[[object], Any], single: tuple[type, ...]) -> tuple[Any, ...] | None:
    """A tuple of items read one by one; a single one becomes a tuple of one, never a sequence of its characters."""
    if isinstance(value, single):
        items: list[object] = [value]
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping | Set):
        items = list(value)
    else:
        return None
    found = [read(item) for item in items]
    return None if any(item is None for item in found) else tuple(found)


def _read_paths(value: object) -> tuple[str, ...] | None:
    return _read_several(value, _read_path, (str, os.PathLike))


def _read_counts(value: object) -> tuple[int, ...] | None:
    return _read_several(value.split(",") if isinstance(value, str) else value, _read_count, (Real,))


def _read_numbers(value: object) -> tuple[float, ...] | None:
    return _read_several(value, read_share, (str, Real))


def _read_ratios(value: object) -> tuple[float, ...] | None:
    if not isinstance(value, str) or ":" not in value:
        found = _read_numbers(value.split(",") if isinstance(value, str) else value)
        return None if found is None else tuple(sorted(set(found)))
    numbers = [read_share(part) for part in value.split(":")]
    if len(numbers) != 3 or None in numbers:
        return None
    start, stop, step = (Decimal(repr(number)) for number in numbers)  # as written: 0.1, not what a float makes of it
    if step <= 0 or start > stop:
        return None
    if (stop - start) / step >= _MOST_RATIOS:
        raise InvalidOption(f"{shortened(value)} are more than {_MOST_RATIOS} ratios; use a larger step")
    return tuple(float(start + i * step) for i in range(int((stop - start) / step) + 1))


_READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    "size": (_read_size, "is not a size; write a number with a unit, such as 5GB or 20GiB"),
    "parameters": (_read_parameters, "is not a number of parameters; write one such as 5B or 800M"),
    "tokens": (_read_tokens, "is not a number of tokens; write one such as 8192 or 32k"),
    "path": (_read_path, "is not the name of a directory; give one"),
    "share": (read_share, "is not a percentage; write it as 5% or 0.05"),
    "ratios": (_read_ratios, "is not a list of ratios; write 0.2,0.3,0.5 or start:stop:step, such as 0.1:0.6:0.1"),
    "dtype": (_read_dtype, "is not the name of a dtype; write one such as bfloat16"),
    "gguf": (_read_gguf_type, "is not the name of a type; write one such as q8_0"),
    int: (_read_count, "is not a whole number; write one such as 1000"),
    float: (_read_number, "is not a number; write one such as 0.5"),
    bool: (_read_bool, "is neither True nor False; give one of them"),
    str: (_read_text, "is not a string; give one"),
    tuple[str, ...]: (_read_paths, "is not a file name; name a file or a list of them"),
    tuple[int, ...]: (_read_counts, "is not a list of whole numbers; write it as 1,8"),
    tuple[float, ...]: (_read_numbers, "is not a list of numbers; write it as 0.2,0.3"),
}
