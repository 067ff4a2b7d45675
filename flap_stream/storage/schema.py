"""Checks of JSON values from files against schemas, before anything relies on their structure."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Any

# One of: a type; a predicate; {key: schema} for an object with at least these keys, where one ending in "?" is
# optional; {str: schema} for an object with any keys; [schema] for a list of any length; (schema, schema) for a list of
# exactly two items.
Schema = Any

MAX_DEPTH = 64  # of nested values: far more than any file of ours has; not measured


def parse_json(data: bytes) -> Any:
    """The value of a JSON document. Raises ValueError if it is not JSON, or nested deeper than MAX_DEPTH."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return value
    raise ValueError("nested too deeply")


def matches(value: Any, schema: Schema) -> bool:
    """Whether a value matches a schema. An integer also matches float; a boolean matches only bool."""
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(_key_matches(value, key, part) for key, part in schema.items())
    if isinstance(schema, list):
        return isinstance(value, list) and all(matches(item, schema[0]) for item in value)
    if isinstance(schema, tuple):
        return isinstance(value, list) and len(value) == len(schema) and all(map(matches, value, schema))
    if not isinstance(schema, type):
        return bool(schema(value))
    if schema is float:
        return isinstance(value, float) or within(-(1 << 53), 1 << 53)(value)
    return isinstance(value, schema) and (schema is bool or not isinstance(value, bool))


def _key_matches(value: dict[str, Any], key: Any, schema: Schema) -> bool:
    if key is str:
        return all(matches(item, schema) for item in value.values())
    name = key.removesuffix("?")
    return matches(value[name], schema) if name in value else key != name


def within(least: int, most: int) -> Callable[[Any], bool]:
    """Schema of an integer in a range, both ends included."""
    return lambda value: type(value) is int and least <= value <= most


natural = within(0, (1 << 63) - 1)


def finite(value: Any) -> bool:
    """Schema of a number that is neither infinite nor NaN."""
    return matches(value, float) and isfinite(value)


def one_of(*choices: Any) -> Callable[[Any], bool]:
    """Schema of one of these strings."""
    return lambda value: isinstance(value, str) and value in choices


def layer_digits(value: Any) -> bool:
    """Schema of a layer's name in file names: its number in at least four digits."""
    return isinstance(value, str) and value.isascii() and value.isdigit() and 4 <= len(value) <= 9


def hexadecimal(value: Any) -> bool:
    """Schema of a sha256 in hexadecimal, or of part of one."""
    return isinstance(value, str) and 0 < len(value) <= 64 and set(value) <= set("0123456789abcdef")
