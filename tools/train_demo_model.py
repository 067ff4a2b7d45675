"""Train the small Llama that ships as `flap_stream/demo/`, on the King James Bible.

Everything in the demo comes from here: held-out texts, tokenizer, sharded bfloat16 checkpoint and README.
The text is read from Debian's `bible` program (package bible-kjv) or from `--text FILE`.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VERSE_LINE = re.compile(r"^(\d?[A-Za-z]+\d+):\d+ (.+)$")  # "1Sm3:4 That the LORD called Samuel"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0, 1, 2
EVALUATION_WINDOW = 128  # tokens
SETTINGS: dict[str, Any] = {
    "optimizer": "AdamW", "betas": (0.9, 0.95), "weight_decay": 0.1, "gradient_clipping": 1.0,
    "peak_lr": 3e-3, "final_lr_share": 0.02, "warmup_share": 0.04,
    "sequence_length": 256, "batch_size": 8, "seed": 0,
}  # fmt: skip


Part = TypeVar("Part")


class Split(NamedTuple, Generic[Part]):
    """Three disjoint parts: texts, one paragraph a chapter, or their token ids, int64 [token]."""

    training: Part
    calibration: Part
    evaluation: Part


def read_chapters(text: str) -> list[str]:
    """Chapters in order, as running prose without verse numbers.

    text: one verse a line, `Book1:2 words`, as `bible -f` prints it; or, if no line looks like that, paragraphs
    between blank lines, each of which then counts as a chapter.
    """
    verses: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := VERSE_LINE.match(line):
            verses.setdefault(match[1], []).append(match[2])
    paragraphs = [" ".join(chapter) for chapter in verses.values()] or re.split(r"\n\s*\n", text)
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]


def shared_ngram_shares(chapters: list[str], words: int = 12) -> list[float]:
    """For each chapter, the share of its word n-grams that some other chapter holds too."""
    ngrams = []
    for chapter in chapters:
        tokens = re.findall(r"[a-z']+", chapter.lower())
        ngrams.append({tuple(tokens[start : start + words]) for start in range(len(tokens) - words + 1)})
    holders = Counter(ngram for chapter in ngrams for ngram in chapter)
    return [sum(holders[ngram] > 1 for ngram in chapter) / max(1, len(chapter)) for chapter in ngrams]


def split_chapters(chapters: list[str], group_size: int = 26, shared_limit: float = 0.02) -> Split[str]:
    """Hold out one chapter for calibration and one for evaluation from every `group_size` neighbours.

    Groups follow the order of the books, so every kind of text is represented. Chapters told twice (2 Kings 19 and
    Isaiah 37, Psalms 14 and 53, ...) share long n-grams; they stay in training, else perplexity would measure memory.
    """
    shares = shared_ngram_shares(chapters)
    calibration, evaluation = [], []
    for start in range(0, len(chapters), group_size):
        group = range(start, min(start + group_size, len(chapters)))
        unique = [index for index in group if shares[index] <= shared_limit]
        if len(unique) >= 4:
            calibration.append(unique[len(unique) // 4])
            evaluation.append(unique[3 * len(unique) // 4])
    training = sorted(set(range(len(chapters))) - set(calibration) - set(evaluation))
    parts = (training, calibration, evaluation)
    return Split(*("\n\n".join(chapters[index] for index in part) + "\n" for part in parts))


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips; nothing is added around it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL_TOKENS.values())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    options = {"model_max_length": 512, "clean_up_tokenization_spaces": False, **SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@torch.inference_mode()
def model_perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """exp of the mean next-token loss inside each window; the first token of a window is context only."""
    windows = tokens.unfold(0, EVALUATION_WINDOW, EVALUATION_WINDOW)  # [window, token]; drops the incomplete tail
    total = 0.0
    for batch in windows.split(64):
        logits = model(batch).logits[:, :-1]  # [window, token, vocabulary]
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


def unigram_perplexity(training: torch.Tensor, tokens: torch.Tensor, vocab_size: int) -> float:
    """The same targets predicted by training frequencies with add-one smoothing, in float64."""
    counts = torch.bincount(training, minlength=vocab_size).double() + 1
    targets = tokens.unfold(0, EVALUATION_WINDOW, EVALUATION_WINDOW)[:, 1:].flatten()
    return math.exp(-(counts / counts.sum()).log()[targets].mean().item())


def train(model: PreTrainedModel, tokens: Split[torch.Tensor], steps: int | None, minutes: float) -> tuple[int, float]:
    """Train in place, in float32, on random windows; returns (steps, elapsed_seconds).

    The learning rate follows progress through `steps` if given (reproducible), else through `minutes` of wall clock.
    """
    parameters = list(model.parameters())
    matrices, norms = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": SETTINGS["weight_decay"]}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["peak_lr"], betas=SETTINGS["betas"], fused=True)
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    bos: Any = model.config.bos_token_id
    offsets = torch.arange(SETTINGS["sequence_length"] + 1)
    last_start = len(tokens.training) - SETTINGS["sequence_length"]
    began, step, average = time.monotonic(), 0, 0.0
    while (progress := step / steps if steps else (time.monotonic() - began) / (60 * minutes)) < 1:
        cosine = (1 + math.cos(math.pi * progress)) / 2
        lr_share = SETTINGS["final_lr_share"] + (1 - SETTINGS["final_lr_share"]) * cosine
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["peak_lr"] * lr_share * min(1.0, progress / SETTINGS["warmup_share"])
        starts = torch.randint(last_start, (SETTINGS["batch_size"], 1), generator=generator)
        windows = tokens.training[starts + offsets]  # [sample, token]
        windows[0, 0] = bos  # some evaluators put <s> first; it must not be a surprise
        output: Any = model(windows[:, :-1])
        loss = F.cross_entropy(output.logits.flatten(0, 1), windows[:, 1:].flatten())
        if getattr(output, "aux_loss", None) is not None:  # of a mixture, which balances its experts
            loss = loss + model.config.router_aux_loss_coef * output.aux_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS["gradient_clipping"])
        optimizer.step()
        average = loss.item() if step == 0 else 0.95 * average + 0.05 * loss.item()
        step += 1
        if step % 20 == 0:
            held = f"  perplexity {model_perplexity(model, tokens.calibration):.2f}" if step % 200 == 0 else ""
            print(f"{time.monotonic() - began:6.0f} s  step {step}  loss {average:.3f}{held}", file=sys.stderr)
    return step, time.monotonic() - began


def readme(folder: Path, tokens: Split[torch.Tensor], training: str) -> str:
    """The demo's README, with the perplexity of the weights as saved: rounding to bfloat16 is part of the demo."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shards, vocab_size = len(list(folder.glob("*.safetensors"))), model.config.vocab_size
    unigram = unigram_perplexity(tokens.training, tokens.evaluation, vocab_size)
    return f"""# Demo model

A Llama of {model.num_parameters():,} parameters ({2 * model.num_parameters():,} bytes in bfloat16, {shards} shards)
with a byte-level BPE tokenizer of {vocab_size} entries, trained from scratch by `tools/train_demo_model.py`.
It serves to try `flap_stream` without a download.

| perplexity on `evaluation.txt`, {EVALUATION_WINDOW}-token windows | |
|---|---|
| this model, as saved | {model_perplexity(model, tokens.evaluation):.2f} |
| unigram frequencies of the training text, add-one smoothing | {unigram:.2f} |

Text: the Authorized (King James) Version of the Bible, 1611, as packaged in Debian's `bible-kjv-text`, without verse
numbers, one paragraph a chapter. It is in the public domain. `calibration.txt` ({len(tokens.calibration):,} tokens) and
`evaluation.txt` ({len(tokens.evaluation):,} tokens) are whole chapters the model has not seen; at most 2 % of the
12-word sequences of each occur in any other chapter.

Training: {training}, {len(tokens.training):,} tokens, float32.
Settings: `{json.dumps(SETTINGS)}`.
"""


def main() -> None:
    """Write the whole demo folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text; default: the output of Debian's `bible` program")
    parser.add_argument("--out", type=Path, default=Path("flap_stream/demo"))
    parser.add_argument("--minutes", type=float, default=25.0, help="training time on the wall clock (default 25)")
    parser.add_argument("--steps", type=int, help="train this many steps instead, which is reproducible")
    arguments = parser.parse_args()
    torch.manual_seed(SETTINGS["seed"])

    bible = ["bible", "-f", "gen1:1-rev22:21"]  # everything, one verse a line
    text = arguments.text.read_text("utf-8") if arguments.text else subprocess.check_output(bible, encoding="utf-8")
    split = split_chapters(read_chapters(text))
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=6, max_position_embeddings=512,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    tokenizer = train_tokenizer(split.training, config.vocab_size)
    tokens = Split(*(torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in split))
    if any(tokenizer.decode(ids) != part for ids, part in zip(tokens, split, strict=True)):
        sys.exit("the tokenizer does not give the text back; check its pre-tokenizer and decoder")
    model = LlamaForCausalLM(config)
    steps, elapsed_seconds = train(model, tokens, arguments.steps, arguments.minutes)

    folder = arguments.out / "model"
    saved: Any = model
    saved.to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")  # several shards, as large models have
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its new class name, which release 4 does not know; both know this one.
    tokenizer_config = folder / "tokenizer_config.json"
    values = json.loads(tokenizer_config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in ("calibration", "evaluation"):
        (arguments.out / f"{name}.txt").write_text(getattr(split, name), encoding="utf-8")
    training = f"{steps} steps in {elapsed_seconds / 60:.1f} minutes on {torch.get_num_threads()} CPU threads"
    description = readme(folder, tokens, training)
    (arguments.out / "README.md").write_text(description, encoding="utf-8")
    print(description)


if __name__ == "__main__":
    main()
