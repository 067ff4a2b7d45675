"""Every causal model type of transformers has a row, or a reason why it has none."""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flap_stream.model.families import FAMILIES

UNCOVERED = Path(__file__).with_name("uncovered_families.txt")


def test_somebody_has_looked_at_every_causal_model_type() -> None:
    rows = dict(line.split(": ", 1) for line in UNCOVERED.read_text().splitlines())
    uncovered = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES)
    assert uncovered == set(rows), "a new release of transformers: add a row to FAMILIES, or a reason to this list"
    assert all(rows.values())
