"""The report shows what the run directory holds, asks nothing of the network, and says what is missing."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from test_cli import run as command
from test_interruption import identities

import flap_stream
from flap_stream.cli import main
from flap_stream.config import CollectConfig, PlanConfig, PruneConfig, SweepConfig
from flap_stream.errors import CorruptRun
from flap_stream.storage.collected import StatisticsStore
from flap_stream.storage.run_directory import RunDirectory

pytest.importorskip("matplotlib")
from flap_stream.report import drawing
from flap_stream.report.facts import Facts, read_facts
from flap_stream.report.figures import drawings
from flap_stream.report.figures.scores import cut_score, scored
from flap_stream.report.figures.sweep import curve_name
from flap_stream.report.numbers import change
from flap_stream.report.page import page, write_report

ALL = ["sizes", "sweep", "kept", "scores", "fluctuation", "cost"]


def make(place: Path, family: str = "llama", **options: Any) -> Path:
    """A collected run directory."""
    model = save(tiny_model(tiny_config(family)), place / "model")
    calibration = (save_tokens(place / "tokens.npy", random_tokens(8, 16)),)
    flap_stream.collect(model, place / "run", CollectConfig(calibration=calibration, **options))
    return place / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make(tmp_path_factory.mktemp("report"))
    flap_stream.plan(run, PlanConfig(ratio=0.4, round_neurons_to=1))
    text = (str(run.parent / "tokens.npy"),)
    for restore in ("none", "bias"):
        flap_stream.sweep(run, SweepConfig(ratios=(0.2, 0.5), evaluate=text, restore=restore))
    return run


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    write_report(run, run.parent / "report.html")
    return (run.parent / "report.html").read_text()


class Page(HTMLParser):
    """What a browser would fetch, all ids and references to them, rows of tables, and whether tags are closed."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[Any] = []
        self.ids: list[Any] = []
        self.references: list[Any] = []
        self.rows: list[Any] = []
        self._open: list[Any] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                (self.references if str(value).startswith("#") else self.fetched).append(str(value))
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "td":
            self.rows[-1].append(data)


def test_the_page_stands_alone(html: str) -> None:
    seen = Page(html)
    assert all(value.startswith("data:image/png") for value in seen.fetched) and seen.fetched
    assert not re.search(r"@import|<script|url\((?!#)", html)
    assert {reference[1:] for reference in seen.references} <= set(seen.ids)
    assert set(ALL) <= set(seen.ids)
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_every_figure_has_its_numbers_in_a_table(html: str) -> None:
    for section in re.findall(r"<section id=.*?</section>", html, flags=re.DOTALL):
        assert "<table>" in section, section[:80]


def test_text_can_be_read_on_a_phone(html: str) -> None:
    """Figures scroll where they do not fit, and nothing in them is smaller than 11 px."""
    width = re.search(r"svg \{[^}]*min-width: (\d+)rem", html)
    assert width is not None and html.count("<svg") == html.count('<div class="scroll" tabindex="0"><svg')
    for figure in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        box = re.search(r'viewBox="0 0 ([\d.]+) ', figure)
        sizes = [float(size) for size in re.findall(r"font: (?:bold )?([\d.]+)px", figure)]
        sizes += [float(size) for size in re.findall(r"font-size: ([\d.]+)px", figure)]
        assert box is not None and sizes and min(sizes) * 16 * int(width[1]) / float(box[1]) >= 11


def test_figures_have_the_pages_colours_and_names_for_those_who_do_not_see_them(html: str) -> None:
    for mark in vars(drawing._MARKS).values():
        assert mark not in html
    assert set(re.findall(r"var\(--(\w+)\)", html)) == {*vars(drawing.LIGHT), "font"}
    svgs = re.findall(r"<svg[^>]*>", html)
    assert len(svgs) == len(ALL) and all('role="img"' in tag and "aria-label=" in tag for tag in svgs)
    fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", html))
    assert fixed <= {"#ffffff", "#000000"}  # the line on the heat map
    assert "mathdefault" not in html and all("DejaVu" not in tag for tag in re.findall(r"<text[^>]*>", html))


def test_numbers_are_those_of_the_run_directory(run: Path, html: str) -> None:
    rows = Page(html).rows
    with RunDirectory(run, is_writer=False) as directory:
        _, keeps = directory.plan.read()
        shapes, costs = directory.layer_shapes, directory.statistics.costs()
        manifest = directory.manifest
    for i, (keep, shape) in enumerate(zip(keeps, shapes, strict=True)):
        assert [
            str(i),
            f"{len(keep.kv_groups)} of {shape.kv_groups}",
            f"{len(keep.neurons)} of {shape.neurons}",
        ] in rows
    for i, cost in enumerate(costs):
        assert cost is not None and cost.tokens == 8 * 16 and cost.peak_host_bytes > 1 << 20
        assert [str(i), f"{cost.seconds:.3f}", "128", f"{cost.peak_host_bytes:,}", "0"] in rows
    facts = read_facts(run)
    sizes = {size.name: size for size in facts.sizes}
    groups, neurons = (sum(len(getattr(keep, name)) for keep in keeps) for name in ("kv_groups", "neurons"))
    removed = sum(shape.prunable - keep.cost(shape) for keep, shape in zip(keeps, shapes, strict=True))
    assert (sizes["parameters"].before, sizes["parameters"].after) == (
        manifest["parameters"],
        manifest["parameters"] - removed + 2 * 64 * len(shapes),  # of these the biases that are added
    )
    assert sizes["weights"].before == 4 * manifest["parameters"]
    assert sizes["KV cache per token"].after == 2 * 16 * groups * 4
    head, hidden, per_neuron = 97 * 64, 64, 3 * 64
    per_group = 16 * hidden * 2 * (2 + 1)  # q and o of two heads, k and v
    assert sizes["FLOPs per token"].after == 2 * (head + groups * per_group + neurons * per_neuron)
    points = facts.curves[-1]["points"]
    for point in points:
        assert any(row[:1] == [f"{point['ratio']:g}"] and f"{point['perplexity']:.4f}" in row for row in rows)


def test_what_is_marked_as_removed_is_what_the_plan_removes(run: Path) -> None:
    facts = read_facts(run)
    cut = cut_score(facts)
    assert cut is not None
    for layers in (facts.kv_groups, facts.neurons):
        for scores, stays in scored(layers):
            assert (scores[~stays] <= cut).all()
            unprotected = np.sort(scores[stays])[:-1]  # the best of a layer stays whatever its score
            assert (unprotected >= cut).all()


@pytest.mark.slow
def test_drawing_changes_nothing_and_is_the_same_every_time(run: Path, html: str, tmp_path: Path) -> None:
    before = identities(run)
    write_report(run, tmp_path / "again.html", tmp_path / "png")
    assert identities(run) == before
    assert (tmp_path / "again.html").read_text() == html
    write_report(run, None, tmp_path / "twice")
    names = sorted(file.name for file in (tmp_path / "png").iterdir())
    assert names == sorted(f"{name}.png" for name in [*ALL, "overview"])
    for name in names:
        body = (tmp_path / "png" / name).read_bytes()
        assert body.startswith(b"\x89PNG") and body == (tmp_path / "twice" / name).read_bytes()


def test_pictures_are_not_empty(run: Path) -> None:
    from matplotlib.image import imread

    facts = read_facts(run)
    for figure in drawings(facts):
        pixels = imread(io.BytesIO(drawing.to_png(facts, figure)))[..., :3]
        assert (np.ptp(pixels, axis=2) > 0.2).mean() > 0.002, figure.name  # coloured ink, not lines and text alone


def test_a_run_that_is_under_way_shows_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = StatisticsStore.write

    def stop(statistics: StatisticsStore, layer: int, *values: Any) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        write(statistics, layer, *values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StatisticsStore, "write", stop)
        make(tmp_path)
    with RunDirectory(tmp_path / "run"):  # held by its writer
        code, out, _ = command(capsys, "report", tmp_path / "run", "--html", tmp_path / "r.html", "--json")
    body = json.loads(out)
    assert code == 0 and body["figures"] == ["cost"] and any("2 of 3 layers" in said for said in body["missing"])
    assert "not planned yet" in (tmp_path / "r.html").read_text()


def test_a_pruned_checkpoint_alone_shows_less_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tiny_model(tiny_config()), tmp_path / "model")
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(8, 16))
    flap_stream.prune(model, tmp_path / "out", PruneConfig(ratio=0.3, calibration=(tokens,)))
    code, out, _ = command(capsys, "report", tmp_path / "out", "--html", tmp_path / "deep" / "r.html")
    assert code == 0 and "pruning.json only" in out
    html = (tmp_path / "deep" / "r.html").read_text()
    assert "Not shown" in html and "Kept in each layer" in html and "Scores and the cut" not in html
    assert "Perplexity on each text" not in html
    for name in ("first", "second"):
        text = save_tokens(tmp_path / f"{name}.npy", random_tokens(4, 16, seed=len(name)))
        for one in (tmp_path / "out", *([model] if name == "first" else [])):
            command(capsys, "evaluate", one, "--text", text, "--save", tmp_path / "out")
    command(capsys, "report", tmp_path / "out", "--html", tmp_path / "deep" / "r.html")
    rows = Page((tmp_path / "deep" / "r.html").read_text()).rows
    (first,), (second,) = ([row for row in rows if row[:1] == [f"{name}.npy"]] for name in ("first", "second"))
    assert first[4] == change(float(first[2]), float(first[3])) and len(second) == 3  # no dense model's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "collect", "plan"),
    [
        ("mixtral", {}, {"ratio": 0.5}),
        ("llama", {"method": "magnitude-sp"}, {"method": "magnitude-sp"}),
        ("llama", {"method": "wanda-sp"}, {"method": "wanda-sp"}),
        ("llama", {"loss_windows": 4}, {"metric": "fisher"}),
        ("llama", {}, {"structure": "ul-mm", "remove_heads": 2, "metric": "ifv"}),
        ("llama", {}, {"min_heads": 0, "structure": "al-mm", "remove_heads": 4, "ratio": 0.6}),
    ],
)
def test_every_way_to_decide_can_be_drawn(
    tmp_path: Path, family: str, collect: dict[str, Any], plan: dict[str, Any]
) -> None:
    run = make(tmp_path, family, **collect)
    flap_stream.plan(run, PlanConfig(**plan))
    assert write_report(run, tmp_path / "r.html").figures == ["sizes", "kept", "scores", "fluctuation", "cost"]


def captions(run: Path) -> dict[str, str]:
    facts = read_facts(run)
    return {figure.name: figure.caption for figure in drawings(facts)}


def test_attention_that_is_left_whole_has_no_sizes(tmp_path: Path) -> None:
    run = make(tmp_path, "olmo2")
    flap_stream.plan(run, PlanConfig(ratio=0.3))
    facts = read_facts(run)
    assert [size.name for size in facts.sizes] == ["parameters", "weights"]
    assert captions(run)["kept"].endswith("are kept. Attention is left whole.")
    assert "FLOPs" not in captions(run)["sizes"]


@pytest.mark.parametrize("method", ["reap", "shortgpt"])
def test_methods_that_score_no_units_show_no_scores(method: str, tmp_path: Path) -> None:
    run = make(tmp_path, "mixtral", method=method)
    flap_stream.plan(run, PlanConfig(method=method, ratio=0.4))
    facts = read_facts(run)
    assert not {"scores", "fluctuation"} & captions(run).keys()
    assert any(said.startswith(f"{method} scores whole") for said in facts.missing)


def test_no_cut_is_drawn_where_units_go_with_their_layer_or_expert(tmp_path: Path) -> None:
    run = make(tmp_path, "mixtral", loss_windows=4, whole_experts=True)
    flap_stream.plan(run, PlanConfig(metric="fisher", whole_experts=True, ratio=0.4))
    assert cut_score(read_facts(run)) is None and "takes all of its units with it" in captions(run)["scores"]


def test_without_a_plan_captions_name_what_was_collected(tmp_path: Path) -> None:
    found = captions(make(tmp_path, method="magnitude-sp"))
    assert "squared norm of the column." in found["fluctuation"] and "standardised" not in found["scores"]


def test_a_sweep_of_which_nothing_but_the_dense_model_is_measured_says_so(run: Path) -> None:
    facts = read_facts(run)
    facts = replace(facts, curves=[{**facts.curves[-1], "points": []}])
    (caption,) = (figure.caption for figure in drawings(facts) if figure.name == "sweep")
    assert caption.startswith("Perplexity of the dense model, the only one measured: ")


def test_a_plan_of_another_method_than_was_written_is_drawn(tmp_path: Path) -> None:
    run = make(tmp_path)
    flap_stream.plan(run, PlanConfig(ratio=0.3))
    flap_stream.rewrite(run, tmp_path / "out")
    flap_stream.plan(run, PlanConfig(method="magnitude-sp", ratio=0.3))
    assert captions(run).keys() >= {"sizes", "kept", "scores"}


def test_a_target_is_of_the_dtype_that_was_written(tmp_path: Path) -> None:
    wide = tiny_config(hidden_size=128, intermediate_size=384, num_attention_heads=4, head_dim=32)
    model = save(tiny_model(wide), tmp_path / "model", dtype=torch.bfloat16)
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(8, 16))
    how: dict[str, Any] = {"target_size": "500KB", "output_dtype": "fp8", "keep_run": True, "calibration": tokens}
    record = flap_stream.prune(model, tmp_path / "out", **how).record
    assert read_facts(tmp_path / "out.run").target == record["target"]


def test_names_from_files_are_text_and_nothing_else(run: Path) -> None:
    nasty = '<script>alert("$x$")</script>'
    facts = read_facts(run)
    curve = {**facts.curves[-1], "restore": nasty, "text": {**facts.curves[-1]["text"], "sources": [nasty]}}
    curve["points"] = [*curve["points"], {**curve["points"][-1], "ratio": 0.9, "perplexity": float("inf")}]
    facts = replace(facts, model=nasty, place=nasty, versions={nasty: nasty}, curves=[curve], missing=[nasty])
    assert "<script" not in page(facts, drawings(facts))


def test_curves_are_named_by_what_tells_them_apart(run: Path) -> None:
    none, bias = read_facts(run).curves
    assert [curve_name(curve) for curve in (none, bias)] == ["flap, no restoration", "flap, bias"]
    other = {**bias, "options": {**bias["options"], "metric": "ifv", "min_heads": 2}}
    assert curve_name(other) == "flap, ifv, min_heads 2, bias"


def test_many_layers_and_curves_are_drawn(run: Path) -> None:
    facts = read_facts(run)
    curves = [
        {**facts.curves[-1], "restore": f"way {i}", "text": {**facts.curves[-1]["text"], "sha256": str(i // 3)}}
        for i in range(6)
    ]
    many: Facts = replace(
        facts, kv_groups=facts.kv_groups * 30, neurons=facts.neurons * 30, costs=facts.costs * 30, curves=curves
    )
    assert page(many, drawings(many)).count("<svg") == len(ALL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run", "--html FILE or --png DIR"),
        ("nowhere --html r.html", "neither a run directory"),
        ("model --html r.html", "a dense model (LlamaForCausalLM, 3 layers"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    run: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert main(["report", *arguments.split(), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert not (run.parent / "r.html").exists()


def test_altered_statistics_are_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    file = next(path for path in (run / "statistics.zarr" / "layers" / "0001").rglob("0") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptRun, match="0001"):
        write_report(run, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_without_matplotlib_it_says_what_to_install(run: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from flap_stream.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["report", str(run), "--html", str(run.parent / "none.html")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "pip install 'flap-stream[plots]'" in result.stderr
    assert result.stderr.count("\n") == 1 and not (run.parent / "none.html").exists()
