"""Code that comes with a model runs in no verb without --trust-remote-code, wherever it is and whatever names it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models import DEMO, random_tokens, save, save_tokens, tiny_config, tiny_model
from transformers import LlamaConfig
from warm_commands import run_warm

import flap_stream
from flap_stream.cli import main
from flap_stream.config import BenchInferenceConfig, PruneConfig
from flap_stream.model.model_code import MODELING_NAME, model_class
from flap_stream.progress import Progress
from flap_stream.stages.bench_inference import Setting, side_by_side
from flap_stream.text.tokenization import pretrained_tokenizer

TEXT = "In the beginning God created the heaven and the earth. " * 40


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("code")
    save(tiny_model(tiny_config(vocab_size=2048)), place / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, place / "model" / name)
    tokens = save_tokens(place / "tokens.npy", random_tokens(6, 16))
    flap_stream.prune(place / "model", place / "out", PruneConfig(ratio=0.4, calibration=(tokens,)))
    (place / "a.txt").write_text(TEXT)
    return place


def payload(file: Path) -> None:
    """Code that leaves a mark when it runs, and has whatever is asked of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mark = Path("ran").absolute()
    file.write_text(
        f"open({str(mark)!r}, 'a').write(__file__)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    pass\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "PrunedLlamaForCausalLM, PrunedLlamaConfig = Own, OwnConfig\n"
        "def generate(model, *args, **kwargs):\n    return None\n"
    )


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def names(module: str) -> dict[str, str]:
    return {"AutoConfig": f"{module}.OwnConfig", "AutoModel": f"{module}.Own", "AutoModelForCausalLM": f"{module}.Own"}


def with_generate(model: Path) -> None:
    payload(model / "custom_generate" / "generate.py")


def with_file_of_our_name(model: Path) -> None:
    payload(model / MODELING_NAME)
    module = MODELING_NAME.removesuffix(".py")
    classes = {"AutoConfig": f"{module}.PrunedLlamaConfig", "AutoModelForCausalLM": f"{module}.PrunedLlamaForCausalLM"}
    edit(model / "config.json", auto_map=classes)


def with_one_byte_more(model: Path) -> None:
    with_file_of_our_name(model)
    own = Path(flap_stream.__file__).parent / "modeling" / MODELING_NAME
    (model / MODELING_NAME).write_text(own.read_text() + f"\nopen({str(Path('ran').absolute())!r}, 'a')\n")


def with_subfolder(model: Path) -> None:
    payload(model / "sub" / "modeling_own.py")
    edit(model / "config.json", auto_map=names("sub/modeling_own"))


def with_dotted_subfolder(model: Path) -> None:
    payload(model / "sub" / "modeling_own.py")
    edit(model / "config.json", auto_map=names("sub.modeling_own"))


def with_path(model: Path) -> None:
    other = model.parent / "elsewhere"
    payload(other / "modeling_own.py")
    edit(model / "config.json", auto_map=names(f"{other}--modeling_own"))


def with_our_name_elsewhere(model: Path) -> None:
    other = model.parent / "elsewhere"
    payload(other / MODELING_NAME)
    edit(model / "config.json", auto_map=names(f"{other}--{MODELING_NAME.removesuffix('.py')}"))


def with_tokenizer(model: Path) -> None:
    payload(model / "tokenization_own.py")
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", "tokenization_own.OwnTokenizer"]}
    edit(model / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")


PAYLOADS: dict[str, Callable[[Path], None]] = {
    "custom_generate": with_generate,
    "a file of our name": with_file_of_our_name,
    "our file and a line more": with_one_byte_more,
    "a subfolder": with_subfolder,
    "a dotted subfolder": with_dotted_subfolder,
    "a path": with_path,
    "our name in another folder": with_our_name_elsewhere,
    "a tokenizer": with_tokenizer,
}
VERBS = [
    "prune model new --calibration a.txt --samples 4 --sequence-length 16",
    "prune out new --calibration tokens.npy --dry-run",
    "prune out new --calibration a.txt --samples 4 --sequence-length 16",
    "collect out run --calibration tokens.npy",
    "evaluate model --text a.txt --sequence-length 16 --samples 2",
    "evaluate out --text a.txt --sequence-length 16 --samples 2",
    "inspect out",
    "report out --html page.html",
    "export-stock out stock --pad",
    "export-gguf out out.gguf",
    "export-gguf model model.gguf",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["our file and a line more", "a path", "a tokenizer"])
def test_no_verb_runs_what_comes_with_a_model(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("model", "out"):
        PAYLOADS["custom_generate"](place / model)
        PAYLOADS[name](place / model)
    for number, verb in enumerate(VERBS):
        code = main([*verb.replace(" new", f" new{number}").split(), "--quiet"])
        said = capsys.readouterr().err
        assert code in (0, 2), (verb, said)
        assert code == 0 or (name == "a tokenizer" and "--trust-remote-code" in said), (verb, said)
        assert not Path("ran").exists(), verb
    for rest in ("collect model run2 --calibration tokens.npy", "plan run2", "rewrite run2 again", "sweep run2"):
        assert main([*rest.split(), "--quiet"]) == 0, capsys.readouterr().err
        assert not Path("ran").exists(), rest


@pytest.mark.slow
@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("model", ["model", "out"])
def test_inference_is_not_timed_by_what_comes_with_a_model(
    name: str, model: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"model": "out", "out": "model"}[model]
    PAYLOADS[name](place / model)
    arguments = ["bench-inference", model, other, "--prompt-lengths", "4", "--generate", "1", "--rounds", "1"]
    code = main([*arguments, "--device", "cpu", "--quiet"])
    said = capsys.readouterr()
    assert not Path("ran").exists(), said
    if name == "a tokenizer":  # which a benchmark does not need
        assert code == 0, said.err
    else:
        assert code == 2 and "--trust-remote-code" in said.err and said.err.count("\n") == 1, said.err


def test_what_is_trusted_runs(place: Path) -> None:
    with_subfolder(place / "model")
    edit(place / "model" / "config.json", auto_map=names("modeling_own"))
    shutil.move(place / "model" / "sub" / "modeling_own.py", place / "model" / "modeling_own.py")
    options = BenchInferenceConfig(rounds=1, trust_remote_code=True, device="cpu")
    side_by_side({"dense": str(place / "model")}, [Setting(1, 4, 1)], options, Progress("silent"))
    assert Path("ran").exists()


@pytest.mark.slow
def test_the_harness_runs_nothing_that_comes_with_a_model(place: Path) -> None:
    for name in ("custom_generate", "our file and a line more", "a tokenizer"):
        PAYLOADS[name](place / "out")
    code = "from flap_stream.integrations.lm_eval import FlapStreamLM; FlapStreamLM('out')"
    done = run_warm([sys.executable, "-c", code])
    assert "allow it with --trust-remote-code" in done.stderr and not Path("ran").exists()
    (place / "out" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    done = run_warm([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert not Path("ran").exists()


def test_a_config_chooses_no_kernels_from_elsewhere() -> None:
    named = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel", "auto_map": {}}
    named["experts_implementation"] = "someone/kernel"
    _, config = model_class({"model_type": "llama", **named})
    assert isinstance(config, LlamaConfig) and config._attn_implementation is None
    assert config._experts_implementation is None and not hasattr(config, "auto_map")


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mistral", "gemma2"])
def test_a_pruned_model_has_the_tokenizer_of_the_dense_one(family: str, tmp_path: Path) -> None:
    save(tiny_model(tiny_config(family)), tmp_path / "model")
    shutil.copy(DEMO / "model" / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(4, 16))
    flap_stream.prune(tmp_path / "model", tmp_path / "out", PruneConfig(ratio=0.4, calibration=(tokens,)))
    dense, pruned = (pretrained_tokenizer(tmp_path / name, False) for name in ("model", "out"))
    assert type(dense) is type(pruned) and dense(TEXT)["input_ids"] == pruned(TEXT)["input_ids"]
