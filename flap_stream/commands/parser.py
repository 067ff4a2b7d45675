"""A parser whose errors are two lines: what is wrong, and what was probably meant."""

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from flap_stream.config.values import parse_count
from flap_stream.errors import InvalidOption

_SEVERAL = ("+", "*")


def whole_number(text: str) -> int:
    """What `type=int` of an argument accepts, including `1e3`."""
    try:
        return parse_count(text)
    except InvalidOption as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """The parser of the whole command line or of one verb.

    An option that takes several values leaves enough of them for the positional arguments:
    `prune --calibration text.txt MODEL OUT` means `prune MODEL OUT --calibration text.txt`.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.register("type", int, whole_number)
        self._meant = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but an unknown argument is an error of the verb it was given to."""
        if args is None or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        options, left = super().parse_known_args(self._with_positionals(args), namespace)
        if left:
            self.error(f"{left[0]!r} is one argument too many")
        return options, left

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and two lines."""
        hint = f"did you mean {self._meant}? " if self._meant else ""
        self.exit(2, f"{self.prog}: {message}\n{hint}See {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            self._suggest(str(value), choices)
            raise argparse.ArgumentError(action, f"{value!r} is unknown; choose one of {', '.join(choices)}")

    def _suggest(self, written: str, known: Iterable[str]) -> None:
        self._meant = next(iter(get_close_matches(written, list(known), n=1)), "")

    def _with_positionals(self, arguments: Sequence[str]) -> list[str]:
        """The arguments, with those moved ahead of an option that it would take although positionals need them."""
        parts: list[list[str]] = []  # positional arguments one by one, options with all that they take
        several: list[int] = []  # indices of the parts that took as much as they could
        at = 0
        while at < len(arguments):
            if arguments[at] == "--":
                parts.append([*arguments[at:]])
                break
            stop = at + 1
            if self._is_option(arguments[at]):
                action = self._option_of(arguments[at])
                if action.nargs in _SEVERAL and "=" not in arguments[at]:
                    while stop < len(arguments) and not self._is_option(arguments[stop]):
                        stop += 1
                    several.append(len(parts))
                elif action.nargs is None and "=" not in arguments[at]:
                    stop += 1
            parts.append([*arguments[at:stop]])
            at = stop
        missing = sum(action.nargs is None for action in self._get_positional_actions())
        missing -= sum(len(part) - 1 if part[0] == "--" else not self._is_option(part[0]) for part in parts)
        for i in reversed(several):
            own = max(0, min(missing, len(parts[i]) - 2))  # the option and one value stay
            split = len(parts[i]) - own
            parts[i], missing = parts[i][split:] + parts[i][:split], missing - own
        return [argument for part in parts for argument in part]

    def _is_option(self, argument: str) -> bool:
        return argument.startswith("-") and len(argument) > 1 and not self._negative_number_matcher.match(argument)

    def _option_of(self, argument: str) -> argparse.Action:
        """The action of an option. An unknown option ends the program."""
        name = argument.partition("=")[0]
        if name not in self._option_string_actions:
            self._suggest(name, self._option_string_actions)
            self.error(f"there is no option {name}")
        return self._option_string_actions[name]
