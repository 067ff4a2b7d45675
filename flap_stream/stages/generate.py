"""`try`: what models write after a prompt, each in memory or, where it does not fit, layer by layer for every token."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_stream.config import TryConfig
from flap_stream.config.rules import options_of
from flap_stream.engine import memory
from flap_stream.engine.device import in_use
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption
from flap_stream.model.model_code import load_model
from flap_stream.model.opening import open_checkpoint
from flap_stream.progress import Progress
from flap_stream.text.tokenization import pretrained_tokenizer

_ROOM = 1.2  # times the weights, which a model needs that is loaded as a whole; not measured


@dataclass(frozen=True)
class Generation:
    """What a model wrote after the prompt: always the likeliest token, up to one that ends the text.

    is_streamed: whether every token took a pass over the whole model on disk.
    """

    model: str
    text: str
    tokens: tuple[int, ...] = field(repr=False)
    seconds: float
    is_streamed: bool


def generate(
    models: Sequence[str | Path],
    prompt: str,
    options: TryConfig | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> Iterator[Generation]:
    """Yield what each model (directory or Hub id) writes after a prompt, one model in memory at a time.

    keywords: the fields of `TryConfig`, in place of `options`. progress: True shows it on stderr.
    Raises InvalidInput for a model or tokenizer that cannot be used.
    """
    options, shown = options_of(TryConfig, "generate", options, keywords), Progress.of(progress)
    for model in models:
        with open_checkpoint(model) as source, torch.inference_mode():
            streamed = StreamedModel(source, options)
            tokenizer = pretrained_tokenizer(source.directory, options.trust_remote_code)
            ids = _prompt_ids(tokenizer, prompt, options.chat_template)
            is_streamed = not _fits(streamed, options)
            started = time.monotonic()
            found = _streamed(streamed, ids, options, shown) if is_streamed else _in_memory(streamed, ids, options)
            with closing(found):
                tokens = tuple(_until_end(islice(found, options.new_tokens), streamed.skeleton.hf_config))
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            yield Generation(str(model), text, tokens, time.monotonic() - started, is_streamed)


def _prompt_ids(tokenizer: Any, prompt: str, chat_template: str) -> list[int]:
    """The prompt's tokens; as a message of a conversation if the tokenizer has a template."""
    if chat_template == "never" or (chat_template == "auto" and not tokenizer.chat_template):
        return _some(list(tokenizer(prompt)["input_ids"]), prompt)
    if not tokenizer.chat_template:
        raise InvalidOption("--chat-template always needs a chat template, and this model's tokenizer has none")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return _some(list(tokenizer(text, add_special_tokens=False)["input_ids"]), prompt)


def _some(ids: list[int], prompt: str) -> list[int]:
    if not ids:
        raise InvalidOption(f"--prompt {prompt!r} has no tokens; give at least a word")
    return ids


def _fits(model: StreamedModel, options: TryConfig) -> bool:
    """Whether the model can be loaded as a whole: a language model by itself, within the memory allowed."""
    if model.checkpoint.wrapper is not None or any(e.encoding for e in model.checkpoint.tensors.values()):
        return False
    needed = _ROOM * model.checkpoint.parameters * model.dtype.itemsize
    own = model.device, options.host_memory, options.device_memory
    return needed < (memory.room(*own) if model.device.type == "cpu" else memory.limits(*own).device)


def _in_memory(model: StreamedModel, ids: Sequence[int], options: TryConfig) -> Generator[int]:
    with _no_bars():
        loaded = load_model(model.checkpoint.directory, model.dtype, options.trust_remote_code)
    loaded = loaded.to(model.device).eval()
    step, cache = torch.tensor([[*ids]], device=model.device), None
    while True:
        output = loaded(step, past_key_values=cache, use_cache=True)
        step, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
        yield int(step)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    had = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had:
            logging.enable_progress_bar()


def _streamed(model: StreamedModel, ids: Sequence[int], options: TryConfig, progress: Progress) -> Generator[int]:
    text = list(ids)
    with in_use(model.device):
        placement = model.place(options, model.job(1, len(ids) + options.new_tokens, head=True))
        logits_of = model.head()
        while True:
            tokens = np.array([text], dtype=np.int64)
            with model.hidden_states(placement.hidden_place, *tokens.shape) as hidden:
                with progress.stage(f"token {len(text) - len(ids) + 1}", len(model.layers)) as stage:
                    batches = LayerPass(model, placement, tokens, [hidden])
                    for i, weights in batches.layers(stage):
                        batches.run_all(i, weights)
                ((_, last),) = hidden.stream(1)
                ((_, logits),) = logits_of(last[0, -1:])
            text.append(int(logits.argmax()))
            yield text[-1]


def _until_end(tokens: Iterator[int], config: Any) -> Iterator[int]:
    """The tokens before the first that ends a text."""
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    for token in tokens:
        if token in ends:
            return
        yield token
