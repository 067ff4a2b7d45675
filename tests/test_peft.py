"""LoRA with PEFT on a pruned checkpoint: a step of training, saving, loading, merging."""

from pathlib import Path

import pytest
import torch
from models import DEMO, load
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def ids(pruned_demo: Path) -> torch.Tensor:
    text = (DEMO / "evaluation.txt").read_text()[:1000]
    return AutoTokenizer.from_pretrained(pruned_demo, trust_remote_code=True)(text, return_tensors="pt").input_ids[
        :, :128
    ]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by PEFT
def test_adapters_train_save_load_and_merge(pruned_demo: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {name: value.clone() for name, value in load(pruned_demo).named_parameters()}
    model = get_peft_model(load(pruned_demo), LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained and all("lora_" in name for name in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(load(pruned_demo), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, expected)
        merged = reloaded.merge_and_unload()
        assert (merged(ids).logits - expected).abs().max() <= 1e-3
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)
    changed = {name for name, value in again.named_parameters() if not torch.equal(value, base[name])}
    assert changed and all(name.rpartition(".")[0].rpartition(".")[2] in PROJECTIONS for name in changed)
