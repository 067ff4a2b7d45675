"""`flap-stream completion SHELL`: scripts made from the parsers, so that completing starts no Python."""

import argparse
from collections.abc import Iterator, Mapping

SHELLS = {
    "bash": "add to ~/.bashrc:  source <(flap-stream completion bash)",
    "zsh": "add to ~/.zshrc, after compinit:  source <(flap-stream completion zsh)",
    "fish": "run once:  flap-stream completion fish > ~/.config/fish/completions/flap-stream.fish",
}
_BASH = """\
# {how}
_flap_stream() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} options=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
    return
  fi
  case "$verb $previous" in
{values}
  esac
  case "$verb" in
{options}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _flap_stream flap-stream
"""


EXAMPLES = ("completion bash > ~/.local/share/bash-completion/completions/flap-stream",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("shell", choices=list(SHELLS), help="; ".join(f"{name}: {how}" for name, how in SHELLS.items()))


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    print(script(options.shell), end="")


def script(shell: str) -> str:
    """The completion script of a shell."""
    from flap_stream.cli import VERBS, add_options
    from flap_stream.commands.parser import Parser

    verbs = {verb: Parser(prog=verb) for verb in VERBS}
    for verb, parser in verbs.items():
        add_options(verb, parser)
    if shell == "fish":
        return "\n".join((f"# {SHELLS[shell]}", *_fish(VERBS, verbs), ""))
    body = _BASH.format(
        how=SHELLS[shell],
        verbs=" ".join(verbs),
        values="\n".join(
            f'    "{verb} {name}") COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$word")); return ;;'
            for verb, parser in verbs.items()
            for name, choices in _choices(parser)
        ),
        options="\n".join(f'    {verb}) options="{" ".join(_names(parser))}" ;;' for verb, parser in verbs.items()),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{body}" if shell == "zsh" else body


def _fish(summaries: Mapping[str, str], verbs: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    for verb, summary in summaries.items():
        yield f"complete -c flap-stream -n __fish_use_subcommand -a {verb} -d {_quoted(summary)}"
    for verb, parser in verbs.items():
        for action in _visible(parser):
            takes = "" if action.nargs == 0 else " -r"
            choices = f" -f -a {_quoted(' '.join(map(str, action.choices)))}" if action.choices else ""
            summary = _quoted((action.help or "") % {**vars(action), "prog": "flap-stream"})
            for name in action.option_strings:
                form = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                where = f'-n "__fish_seen_subcommand_from {verb}"'
                yield f"complete -c flap-stream {where} {form}{takes}{choices} -d {summary}"


def _visible(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]


def _names(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in _visible(parser) for name in action.option_strings if name.startswith("--")]


def _choices(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Options with a closed set of values."""
    for action in _visible(parser):
        for name in action.option_strings:
            if action.choices:
                yield name, [str(choice) for choice in action.choices]


def _quoted(text: str) -> str:
    """A word of fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
