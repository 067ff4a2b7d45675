"""Scripts that complete commands: bash itself is asked what it offers."""

import shlex
import shutil
import subprocess

import pytest

from flap_stream.cli import VERBS, add_options, main
from flap_stream.commands.completion import SHELLS, script
from flap_stream.commands.parser import Parser
from flap_stream.config import METRICS


def offered(line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    ask = f"{script('bash')}\nCOMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _flap_stream\n"
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
    found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return found.stdout.split()


def test_bash_offers_verbs_options_values_and_files(place: object) -> None:
    assert offered("flap-stream ") == [*VERBS] and offered("flap-stream ev") == ["evaluate"]
    assert offered("flap-stream prune model out --metric ") == [*METRICS]
    assert offered("flap-stream prune --round-n") == ["--round-neurons-to"]
    assert "--refit-target" not in offered("flap-stream prune --re") and "--recipe" in offered("flap-stream prune --re")
    assert offered("flap-stream prune mod") == ["model"]
    assert offered("flap-stream push --base") == ["--base-model"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_that_it_can_read(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS) and SHELLS[shell] in text
    assert shell != "fish" or all(line.startswith(("#", "complete -c flap-stream -n ")) for line in text.splitlines())
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_every_verb_are_commands(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog=verb)
    add_options(verb, parser)
    examples = [shlex.split(line.partition(">")[0])[1:] for line in (parser.epilog or "").splitlines()[1:]]
    assert examples and all(words[0] == verb for words in examples)
    for words in examples:
        parser.parse_args(words[1:])
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert f"examples:\n  flap-stream {verb}" in capsys.readouterr().out
