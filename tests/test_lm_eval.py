"""lm-evaluation-harness scores pruned checkpoints alike through transformers and layer by layer."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from models import DEMO, put_bos_before_texts
from warm_commands import run_warm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # the harness, and what it loads tasks with


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of multiple choices and one of perplexity, on the bundled text."""
    place = tmp_path_factory.mktemp("tasks")
    words = (DEMO / "evaluation.txt").read_text().split()
    with open(place / "choices.jsonl", "w") as file:
        for i in range(12):
            start, size = 400 * i, 5 + 25 * (i % 4)  # contexts of several lengths
            question, right = " ".join(words[start : start + size]), " ".join(words[start + size : start + size + 4])
            wrong = [" ".join(words[start + 150 + k : start + 151 + k + i % 3]) for k in range(2)]
            file.write(json.dumps({"question": question, "choices": [*wrong, right], "answer": 2}) + "\n")
    with open(place / "texts.jsonl", "w") as file:
        for i in range(3):
            file.write(json.dumps({"text": " ".join(words[1000 * i : 1000 * i + 150 + 350 * i])}) + "\n")
    dataset = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: "
    (place / "choices.yaml").write_text(
        f"task: choices\n{dataset}{place}/choices.jsonl\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (place / "texts.yaml").write_text(
        f"task: texts\n{dataset}{place}/texts.jsonl\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: word_perplexity\n"
    )
    return place


def evaluate(model: str, options: str, tasks: Path) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import flap_stream.integrations.lm_eval  # noqa: F401 (it registers the model)

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=options,
        tasks=["choices", "texts"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
    )
    return results


def test_both_ways_score_alike(pruned_demo: Path, tasks: Path) -> None:
    common = f"pretrained={pruned_demo},dtype=float32,max_length=200,trust_remote_code=True"
    theirs, ours = evaluate("hf", common, tasks), evaluate("flap_stream", common, tasks)
    for task in ("choices", "texts"):
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-5), name
        for expected, found in zip(theirs["samples"][task], ours["samples"][task], strict=True):
            pairs = zip(expected["filtered_resps"], found["filtered_resps"], strict=True)
            for a, b in pairs:
                (score, greedy), (own_score, own_greedy) = (x if isinstance(x, tuple) else (x, None) for x in (a, b))
                assert own_score == pytest.approx(score, abs=1e-4 if task == "choices" else 1e-2)
                assert own_greedy == greedy


def test_generation_is_refused(pruned_demo: Path) -> None:
    from flap_stream.errors import InvalidInput
    from flap_stream.integrations.lm_eval import FlapStreamLM

    with pytest.raises(InvalidInput, match="--model hf"):
        FlapStreamLM(str(pruned_demo)).generate_until([])


def test_the_command_line_knows_the_model(pruned_demo: Path, tasks: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "flap_stream.integrations.lm_eval",
        "run",
        "--model",
        "flap_stream",
        "--tasks",
        "choices",
    ]
    command += ["--model_args", f"pretrained={pruned_demo},host_memory=4GiB", "--include_path", str(tasks)]
    command += ["--output_path", str(tmp_path / "results.json"), "--device", "cpu"]
    result = run_warm(command, env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "|choices|" in result.stdout and "acc_norm" in result.stdout


@pytest.fixture(scope="module")
def with_bos(pruned_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model with a tokenizer that puts `<s>`, which is 0, before a text."""
    place = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(pruned_demo, place)
    put_bos_before_texts(place)
    return place


def test_bos_begins_what_is_scored(with_bos: Path, pruned_demo: Path) -> None:
    """Windows of a long text, and a context that is too long, no less than what begins a text."""
    from lm_eval.api.instance import Instance

    from flap_stream.integrations.lm_eval import FlapStreamLM

    words = (DEMO / "evaluation.txt").read_text().split()
    text, context = " ".join(words[:150]), " ".join(words[:90])

    def asked(model: Path, bos: str) -> tuple[list[Any], list[list[int]]]:
        found: list[Any] = []

        class Asked(FlapStreamLM):
            def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
                found.extend(requests)
                return [(0.0, True)] * len(requests)

        harness = Asked(str(model), max_length=64, bos=bos)
        harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        rolling = list(found)
        found.clear()
        harness.loglikelihood([Instance("loglikelihood", {}, (context, " the end"), 0)])
        truncated = [list(row) for _, tokens, _ in harness._groups(found) for row in tokens]
        return rolling, truncated

    for model, bos, begins in (
        *((with_bos, "auto", True), (with_bos, "always", True), (with_bos, "never", False)),
        *((pruned_demo, "auto", False), (pruned_demo, "always", True)),
    ):
        rolling, truncated = asked(model, bos)
        assert len(rolling) > 2
        assert all((context[0] == 0) == begins for _, context, _ in rolling[1:])
        assert all(len(context) + len(continuation) <= 65 for _, context, continuation in rolling)
        assert len(truncated[0]) == 65 and (truncated[0][0] == 0) == begins
    predicted = [token for _, _, continuation in asked(pruned_demo, "always")[0] for token in continuation]
    assert [t for t in predicted if t] == [t for _, _, c in asked(pruned_demo, "never")[0] for t in c]
