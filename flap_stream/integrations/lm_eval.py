"""The model `flap_stream` of lm-evaluation-harness: scores tasks on models too large for memory, layer by layer.

The harness does not discover models of other packages, so this module is its command line with one more model:

    python -m flap_stream.integrations.lm_eval run --model flap_stream --model_args pretrained=DIR --tasks hellaswag

From Python, importing this module is enough: `lm_eval.simple_evaluate(model="flap_stream", ...)`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, resolve_max_length

from flap_stream.config import EngineConfig, TextConfig
from flap_stream.config.values import parse_size
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidInput
from flap_stream.model.opening import open_checkpoint
from flap_stream.progress import Progress
from flap_stream.stages.evaluate import score_tokens
from flap_stream.text.tokenization import described, pretrained_tokenizer, window_prefix

_SHORTEST = 16  # tokens of the shortest group, so that very short requests share one; not measured
_DEFAULT_LENGTH = 2048  # where neither config nor tokenizer has a maximum; the harness's own default

Request = tuple[Any, list[int], list[int]]  # the request's text, tokens of the context and of the continuation


@register_model("flap_stream")
class FlapStreamLM(TemplateLM):
    """Log-likelihoods of a model that has one decoder layer in memory at a time.

    Requests are grouped by length, rounded up to a power of two, and padded within their group: at most half of the
    computation is padding, except for the shortest requests, and each group reads the model once.
    pretrained: a directory or a Hub id (at `revision`), dense or pruned.
    max_length: tokens of the longest window; None is the model's.
    host_memory, device_memory: sizes such as `20GiB`; the other options are those of `flap-stream evaluate`. As there,
    `bos` starts every window, including those in the middle of a text, where the harness's `hf` adds none.
    """

    # More parameters than elsewhere in this package: the harness passes --model_args as keywords, so that each
    # parameter is an option that its users write.
    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: str | int = "auto",
        max_length: int | None = None,
        host_memory: str | None = None,
        device_memory: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        bos: str = "auto",
        **harness: Any,
    ) -> None:
        super().__init__()
        model = pretrained if revision is None or Path(pretrained).is_dir() else f"{pretrained}@{revision}"
        self._options = EngineConfig(
            device=device or "auto",
            dtype=dtype,
            batch_size=None if str(batch_size).startswith("auto") else int(batch_size),
            host_memory=None if host_memory is None else parse_size(host_memory),
            device_memory=None if device_memory is None else parse_size(device_memory),
            trust_remote_code=trust_remote_code,
        )
        self._model = StreamedModel(open_checkpoint(model), self._options)
        self.tokenizer = pretrained_tokenizer(self._model.checkpoint.directory, trust_remote_code)
        self._bos = TextConfig(bos=bos).bos
        self._prefix = list(window_prefix(described(self.tokenizer, self._model.checkpoint.directory), self._bos))
        known = self._model.skeleton.hf_config
        self.max_length = max_length or resolve_max_length(known, self.tokenizer, default=_DEFAULT_LENGTH)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context, the same as in the harness's `hf`."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's request cache."""
        return self._model.checkpoint.source.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, formatted by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with special tokens as the tokenizer adds them, unless told otherwise or already there."""
        if add_special_tokens is None and self._bos == "never":
            add_special_tokens = False
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens = self.tokenizer.encode(string, **how)
        is_bare = self._bos == "always" and add_special_tokens is None and not self._begins(tokens)
        return [*self._prefix, *tokens] if is_bare else tokens

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that predict each token once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pieces = self._rolling(tokens, self.max_length)
            if self._prefix and len(pieces) > 1:  # windows in the middle of the text need room for it
                pieces = self._rolling(tokens, self.max_length - len(self._prefix))
                pieces[1:] = [([*self._prefix, *context], continuation) for context, continuation in pieces[1:]]
            windows += [(None, context, continuation) for context, continuation in pieces]
            owners += [owner] * len(pieces)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def _rolling(self, tokens: list[int], length: int) -> list[tuple[list[int], list[int]]]:
        """Contexts and continuations of consecutive windows of at most `length` tokens."""
        pieces = utils.get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=length, context_len=1
        )
        return list(map(utils.make_disjoint_window, pieces))

    def _begins(self, tokens: list[int]) -> bool:
        """Whether the tokens begin with the prefix of every window."""
        return tokens[: len(self._prefix)] == self._prefix

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Not supported: each token would read the whole model. Raises InvalidInput."""
        raise InvalidInput(
            "the model flap_stream only scores log-likelihoods; generation would read the whole model from disk for "
            "every token, so run generation tasks with --model hf"
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Summed log-probabilities of each continuation, and whether greedy decoding would produce it."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for chosen, tokens, wanted in self._groups(requests):
            placement = self._model.place(self._options, self._model.job(*tokens.shape, head=True))
            scores, likeliest = score_tokens(self._model, tokens, placement, Progress("silent"), wanted)
            ends = np.cumsum(wanted.sum(axis=1))[:-1]
            for request, own_scores, own_likeliest in zip(
                chosen, np.split(scores, ends), np.split(likeliest, ends), strict=True
            ):
                results[request] = float(own_scores.sum(dtype=np.float64)), bool(own_likeliest.all())
        return results

    def _groups(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Requests of similar length: their indices, int64 tokens and a bool for each prediction to score.

        Tokens are `[request, token]`, padded on the right, which does not affect the predictions before it. Requests
        that are too long lose the beginning of their context, but not BOS.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        windows = [self._fitting(context + continuation, len(continuation)) for _, context, continuation in requests]
        for number, window in enumerate(windows):
            length = max(_SHORTEST, 1 << (len(window) - 1).bit_length())
            groups[min(length, self.max_length + 1)].append(number)
        for numbers in groups.values():
            length = max(len(windows[number]) for number in numbers)
            tokens = np.zeros((len(numbers), length), dtype=np.int64)
            wanted = np.zeros((len(numbers), length - 1), dtype=bool)
            for row, number in enumerate(numbers):
                window, scored = windows[number], len(requests[number][2])
                tokens[row, : len(window)] = window
                wanted[row, len(window) - 1 - scored : len(window) - 1] = True
            yield numbers, tokens, wanted

    def _fitting(self, window: list[int], scored: int) -> list[int]:
        """The window, shortened to its prefix and its end if it is too long. scored: tokens at the end to predict."""
        most = self.max_length + 1
        if len(window) <= most or scored + len(self._prefix) >= most or not self._begins(window):
            return window[-most:]
        return [*self._prefix, *window[len(self._prefix) - most :]]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
