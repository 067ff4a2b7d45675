"""Compare vLLM with transformers on pruned checkpoints: the bundled model, and tiny random ones of other families.

Run with the project's python; `--vllm-python` names that of an environment with vLLM and flap-stream in it
(`check_vllm.sh` makes one). For each way to run a checkpoint it prints the largest difference of the prompts'
log-probabilities, in float32, and whether 32 greedy tokens are equal; it fails if they are not, or at a difference of
1e-3. With `--families` it runs one tiny checkpoint of each family, or of those named, through the Transformers backend;
there a family fails only if vLLM runs its dense model rightly.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

BOUND, STEPS = 1e-3, 32
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
BACKEND = {"trust_remote_code": True, "model_impl": "transformers"}
ENGINE = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}


def checkpoints(place: Path) -> dict[str, Path]:
    """Pruned checkpoints by name, in sizes that two tensor-parallel ranks can divide."""
    import flap_stream
    from flap_stream.config import PruneConfig

    demo = Path(flap_stream.__file__).parent / "demo"
    common: dict[str, Any] = {"samples": 32, "tensor_parallel": 2}
    text = (str(demo / "calibration.txt"),)
    made = {"demo": place / "demo"}
    flap_stream.prune(demo / "model", made["demo"], PruneConfig(ratio=0.3, calibration=text, **common))
    from models import random_tokens, save, save_tokens, tiny_config, tiny_model

    tokens = (save_tokens(place / "tokens.npy", random_tokens(8, 24)),)
    for family in ("llama", "mistral", "qwen2", "qwen3", "seed_oss"):
        model = tiny_model(tiny_config(family, 4, head_dim=32, eos_token_id=None), seed=3)
        for restore in ("bias", "none"):
            name = f"{family}-{restore}"
            options = PruneConfig(ratio=0.4, calibration=tokens, restore=restore, **common)
            made[name] = place / name
            flap_stream.prune(save(model, place / f"{family}-dense"), made[name], options)
    for restore in ("bias", "none"):
        name = f"llama-{restore}, a layer without heads"
        options = PruneConfig(
            ratio=0.6, structure="al-mm", remove_heads=10, min_heads=0, calibration=tokens, restore=restore, samples=32
        )
        made[name] = place / f"emptied-{restore}"
        record = flap_stream.prune(place / "llama-dense", made[name], options).record
        assert any(not layer["kept_kv_groups"] for layer in record["layers"])
    return made


def tiny_pruned(family: str, place: Path) -> tuple[Path, Path]:
    """A tiny random model of a family, in sizes that vLLM has kernels for, and the same pruned."""
    from models import FAMILY_EXTRAS, random_tokens, save, save_tokens, tiny_config, tiny_model

    import flap_stream
    from flap_stream.config import PruneConfig

    sizes: dict[str, Any] = {"hidden_size": 128, "eos_token_id": None}
    if "head_dim" in FAMILY_EXTRAS[family]:
        sizes["head_dim"] = 32
    if "kv_lora_rank" in FAMILY_EXTRAS[family]:
        sizes |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
        sizes["head_dim"] = 64
    if "index_head_dim" in FAMILY_EXTRAS[family]:
        sizes["index_head_dim"] = 128
    if "mamba_n_heads" in FAMILY_EXTRAS[family]:
        sizes["mamba_n_heads"] = 16
    dense = save(tiny_model(tiny_config(family, **sizes), seed=3), place / f"{family}-dense")
    tokens = (save_tokens(place / "tokens.npy", random_tokens(8, 24)),)
    flap_stream.prune(dense, place / family, PruneConfig(ratio=0.4, calibration=tokens, samples=8))
    return dense, place / family


def reference(path: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Log-probability of each prompt's tokens but the first, and greedy continuations, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
    scores, continuations = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            chances = model(ids).logits[0, :-1].log_softmax(-1)
        scores.append(chances.gather(1, ids[0, 1:, None])[:, 0].tolist())
        output = model.generate(ids, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        continuations.append(output[0, len(prompt) :].tolist())
    return {"scores": scores, "continuations": continuations}


def run_vllm(model: str, prompts: list[list[int]], **engine: Any) -> dict[str, Any]:
    """The same by vLLM, in its own environment."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, skip_tokenizer_init=True, **ENGINE, **engine)
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    scores = [
        [step[token].logprob for step, token in zip(o.prompt_logprobs[1:], prompt[1:], strict=True)]
        for o, prompt in zip(outputs, prompts, strict=True)
    ]
    return {"scores": scores, "continuations": [list(o.outputs[0].token_ids) for o in outputs]}


def ask_server(python: str, model: Path, prompts: list[list[int]], port: int = 8765) -> dict[str, Any]:
    """The same through the OpenAI-compatible server, started and stopped here."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    with open(model.parent / "server.log", "w") as log:
        server = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"the server stopped; see {model.parent / 'server.log'}")
                time.sleep(1)
        scores, continuations = [], []
        for prompt in prompts:
            body = {"model": str(model), "prompt": prompt, "max_tokens": STEPS, "temperature": 0, "ignore_eos": True}
            body |= {"prompt_logprobs": 0, "return_token_ids": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            choice = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]
            steps = zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)
            scores.append([step[str(token)]["logprob"] for step, token in steps])
            continuations.append(choice["token_ids"])
    finally:
        server.terminate()
        server.wait()
    return {"scores": scores, "continuations": continuations}


class VllmFailedError(Exception):
    """What vLLM wrote when it failed."""

    def reason(self) -> str:
        """The first error in it."""
        errors = (
            re.search(r"[A-Z]\w*Error: .+", line) for line in str(self).splitlines() if "EngineCore init" not in line
        )
        return next((found[0] for found in errors if found), str(self)[-200:])


def in_vllm(python: str, model: Path, prompts: list[list[int]], **engine: Any) -> dict[str, Any]:
    """`run_vllm` in a process of vLLM's environment. Raises VllmFailedError."""
    job = json.dumps({"model": str(model), "prompts": prompts, **engine})
    result = subprocess.run(
        [python, __file__, "--job", job], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise VllmFailedError(result.stdout + result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def compare(name: str, expected: dict[str, Any], found: dict[str, Any]) -> bool:
    """Print a line; whether the bounds hold."""
    prompts = zip(expected["scores"], found["scores"], strict=True)
    difference = max(abs(a - b) for ours, theirs in prompts for a, b in zip(ours, theirs, strict=True))
    equal = expected["continuations"] == found["continuations"]
    print(f"{name:44s} {difference:.1e}  greedy {'equal' if equal else 'DIFFERENT'}", flush=True)
    return difference <= BOUND and equal


def prompts_for(model: Path) -> list[list[int]]:
    """Three prompts of 20 to 40 tokens."""
    vocabulary = json.loads((model / "config.json").read_bytes())["vocab_size"]
    return [[3 + (7 * i + i * i * k) % (vocabulary - 3) for i in range(20 + 10 * k)] for k in range(3)]


def check_ways(python: str, place: Path) -> bool:
    """Whether every way to run the bundled model and the plugin's families holds the bounds."""
    holds = []
    for name, path in checkpoints(place).items():
        prompts = prompts_for(path)
        expected = reference(path, prompts)
        ways = {"plugin, no trust flag": in_vllm(python, path, prompts)}
        if name == "demo":
            ways["Transformers backend"] = in_vllm(python, path, prompts, **BACKEND)
            ways["plugin, two tensor-parallel ranks"] = in_vllm(python, path, prompts, tensor_parallel_size=2)
            ways["OpenAI-compatible server"] = ask_server(python, path, prompts)
        holds += [compare(f"{name}, {way}", expected, found) for way, found in ways.items()]
    return all(holds)


def check_families(python: str, place: Path, names: list[str]) -> bool:
    """Whether the Transformers backend runs each family's pruned model as far as it runs the dense one."""
    holds = []
    for name in names:
        dense, pruned = tiny_pruned(name, place)
        holds.append(_runs(python, name, pruned) or not _runs(python, f"{name}, dense", dense))
    return all(holds)


def _runs(python: str, name: str, model: Path) -> bool:
    prompts = prompts_for(model)
    try:
        return compare(name, reference(model, prompts), in_vllm(python, model, prompts, **BACKEND))
    except VllmFailedError as failure:
        print(f"{name:44s} {failure.reason()}", flush=True)
        return False


def main() -> None:
    """Prune, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", help="python of an environment with vLLM and flap-stream")
    parser.add_argument("--families", nargs="*", metavar="NAME", help="of each family, or of these")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_vllm(**json.loads(options.job))))
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    with tempfile.TemporaryDirectory() as directory:
        if options.families is None:
            holds = check_ways(options.vllm_python, Path(directory))
        else:
            from models import FAMILY_EXTRAS

            holds = check_families(options.vllm_python, Path(directory), options.families or sorted(FAMILY_EXTRAS))
    sys.exit(0 if holds else "some bound does not hold")


if __name__ == "__main__":
    main()
