"""The trained adapter on the real all-MiniLM-L6-v2: merged and unmerged embed alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from dora_convert import api

ADAPTER = Path(__file__).parents[2] / "fixtures" / "minilm"
TEXTS = ["os.path join", "Return a random integer in the range", "x", "A cat sat on the mat."] * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_embeddings(minilm: Path, tmp_path: Path) -> None:
    api.merge(ADAPTER, tmp_path / "out", base=minilm)
    tokens = AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"].unsqueeze(2)

    def embed(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.eval()(**tokens).last_hidden_state
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    plain = embed(AutoModel.from_pretrained(minilm))
    unmerged = embed(PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), ADAPTER))
    merged = embed(AutoModel.from_pretrained(tmp_path / "out"))
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(merged, unmerged).min()) > 1 - 1e-6
    assert float(cosine(merged, plain).min()) < 0.99  # the adapter does something
