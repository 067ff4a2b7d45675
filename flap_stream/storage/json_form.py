"""Whether a JSON value from a file has the form that its reader counts on."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Any

# A type; a function that tells; {key: form} for an object that has these keys, at least, those ending in "?" not
# always; {str: form} for an object with any keys; [form] for a list of such; (form, form) for a list of just these.
Form = Any

MOST_DEPTH = 64


def parsed(data: bytes) -> Any:
    """The value that a file's bytes hold. Raises ValueError for what is no JSON, or nested beyond MOST_DEPTH."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return value
    raise ValueError("nested too deeply")


def has_form(value: Any, form: Form) -> bool:
    """Whether a value is of a form; whole numbers are numbers too, truth values are not."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(_has_key(value, key, part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(item, form[0]) for item in value)
    if isinstance(form, tuple):
        return isinstance(value, list) and len(value) == len(form) and all(map(has_form, value, form))
    if not isinstance(form, type):
        return bool(form(value))
    if form is float:
        return isinstance(value, float) or within(-(1 << 53), 1 << 53)(value)
    return isinstance(value, form) and (form is bool or not isinstance(value, bool))


def _has_key(value: dict[str, Any], key: Any, form: Form) -> bool:
    if key is str:
        return all(has_form(item, form) for item in value.values())
    name = key.removesuffix("?")
    return has_form(value[name], form) if name in value else key != name


def within(least: int, most: int) -> Callable[[Any], bool]:
    """Form of a whole number in a range, both ends included."""
    return lambda value: type(value) is int and least <= value <= most


natural = within(0, (1 << 63) - 1)


def finite(value: Any) -> bool:
    """Form of a number that is neither infinite nor NaN."""
    return has_form(value, float) and isfinite(value)


def one_of(*choices: Any) -> Callable[[Any], bool]:
    """Form of one of these strings."""
    return lambda value: isinstance(value, str) and value in choices


def layer_name(value: Any) -> bool:
    """Form of the name that a layer's files have."""
    return isinstance(value, str) and value.isascii() and value.isdigit() and 4 <= len(value) <= 9


def hexadecimal(value: Any) -> bool:
    """Form of a digest, or of a part of one."""
    return isinstance(value, str) and 0 < len(value) <= 64 and set(value) <= set("0123456789abcdef")
