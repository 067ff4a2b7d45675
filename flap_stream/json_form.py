"""Whether a JSON value from a file has the form that its reader counts on."""

from typing import Any

Form = Any  # a type; {key: form} for an object that has these keys, at least; [form] for a list of such


def has_form(value: Any, form: Form) -> bool:
    """Whether a value is of a form; whole numbers are numbers too, truth values are not."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and has_form(value[key], f) for key, f in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(item, form[0]) for item in value)
    if form is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, form) and (form is bool or not isinstance(value, bool))
