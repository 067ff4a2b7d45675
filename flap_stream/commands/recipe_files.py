"""Recipes: TOML files with options of verbs, read before the command line, whose options win.

Keys are options without their dashes. At the top they are for every verb that has them, in a table named after a verb
for that verb alone.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flap_stream.config import TARGETS
from flap_stream.config.values import did_you_mean, option_name
from flap_stream.errors import InvalidOption

OPTION = "--recipe"
# Options that say the same in different ways: one of them on the command line replaces any of them.
_AIMS = ("--ratio", *(f"--{option_name(name)}" for name in TARGETS))


def with_recipe(verbs: Mapping[str, argparse.ArgumentParser], arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, after those of the recipe that it names, if it names one.

    verbs: the parser of each. Raises InvalidOption for a file that is no recipe of these verbs.
    """
    place = next((i for i, argument in enumerate(arguments) if argument.partition("=")[0] == OPTION), None)
    verb = next((argument for argument in arguments if argument in verbs), None)
    if place is None or verb is None:
        return [*arguments]
    _, is_joined, file = arguments[place].partition("=")
    rest = [*arguments[:place], *arguments[place + (1 if is_joined else 2) :]]
    if not is_joined:
        file = next(iter(arguments[place + 1 : place + 2]), "")
    if not file:
        raise InvalidOption(f"{OPTION} names no file; give the path of one, such as job.toml")
    recipe = _read(Path(file))
    found = _of_verb(verbs, verb, recipe, file)
    given = {argument.partition("=")[0] for argument in rest}
    if given & {*_AIMS}:
        given |= {*_AIMS, *(("--context", "--batch") if "--target-memory" not in given else ())}
    at = rest.index(verb) + 1
    own = [word for option, words in found.items() if option not in given for word in words]
    return [*rest[:at], *own, *rest[at:]]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidOption(f"{OPTION} {file}: {error.strerror}; give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{OPTION} {file} is not TOML: {error}") from error


def _of_verb(
    verbs: Mapping[str, argparse.ArgumentParser], verb: str, recipe: Mapping[str, Any], file: str
) -> dict[str, list[str]]:
    """Option to the words that give it its value, for one verb; all other keys are checked too."""
    found: dict[str, list[str]] = {}
    options = {name: _options(parser) for name, parser in verbs.items()}
    everywhere = {option: action for own in options.values() for option, action in own.items()}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            if key not in verbs:
                raise InvalidOption(f"{file} has a table [{key}], which is no verb{did_you_mean(key, verbs)}")
            for inner, setting in value.items():
                option, words = _words(options[key], inner, setting, f"{file} in [{key}]")
                if key == verb:
                    found[option] = words
        else:
            option, words = _words(everywhere, key, value, file)
            if option in options[verb]:
                found.setdefault(option, words)
    return found


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    known = {option: action for action in parser._actions for option in action.option_strings}
    return {option: action for option, action in known.items() if option not in (OPTION, "-h", "--help")}


def _words(options: Mapping[str, argparse.Action], key: str, value: Any, where: str) -> tuple[str, list[str]]:
    """An option, and the words that give it a value on a command line; none for a switch that is off."""
    option = f"--{key.replace('_', '-')}"
    action = options.get(option)
    if action is None:
        names = [name.removeprefix("--") for name in options]
        raise InvalidOption(f"{where} has {key}, which is no option{did_you_mean(option.removeprefix('--'), names)}")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InvalidOption(f"{where} has {key} = {value!r}; it is a switch, so give true or false")
        return option, [option] if value else []
    takes_several = action.nargs in ("+", "*")
    if isinstance(value, list) and not takes_several:
        raise InvalidOption(f"{where} has a list for {key}, which takes one value")
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in values):
        raise InvalidOption(f"{where} has {key} = {value!r}; give a number or text{' or a list' * takes_several}")
    return option, [option, *map(str, values)] if takes_several else [f"{option}={value}"]
