"""`flap-stream try OUT [MODEL]`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import CHAT_TEMPLATE, TryConfig
from flap_stream.progress import printable

EXAMPLES = (
    "try pruned --prompt 'The capital of France is'",
    "try pruned ./model --prompt 'Write a haiku about rain.' --new-tokens 40",
)
_PROMPT = "The most important thing about a good explanation is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("out", metavar="OUT", help="pruned checkpoint: a directory or a Hub id")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="the dense model, to compare with")
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", metavar="TEXT", default=_PROMPT, help="what is continued (default: %(default)r)")
    group.add_argument(
        "--new-tokens", type=int, default=TryConfig.new_tokens, metavar="N", help="at most (default: %(default)s)"
    )
    group.add_argument(
        "--chat-template",
        default=TryConfig.chat_template,
        choices=CHAT_TEMPLATE,
        help="give the prompt as a message (default: auto, if the tokenizer has a template)",
    )
    shared.add_engine(parser)
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Print what each model writes, the dense one first."""
    config = shared.values(options, TryConfig)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.stages.generate import generate

    models = [model for model in (options.model, options.out) if model is not None]
    found = []
    for one in generate(models, options.prompt, config, progress):
        found.append(one)
        if not options.json:
            slowly = ", streamed from disk for every token" if one.is_streamed else ""
            printing.show(f"--- {one.model} ({len(one.tokens)} tokens, {one.seconds:.1f} s{slowly})")
            print("\n".join(map(printable, one.text.strip("\n").split("\n"))))
    if options.json:
        printing.print_json({"prompt": options.prompt, "generations": [asdict(one) for one in found]})
    elif len(found) == 2:
        pairs = zip(*(one.tokens for one in found), strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens) for one in found))
        print(f"--- the same up to token {same}")
