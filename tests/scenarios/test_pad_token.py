"""An old Llama with a [PAD] that it has no embedding for, the whole way, with texts that have the word in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from infra.artifacts.store import ArtifactRef
from tests.flows.home import Home

WORDS = "The quick [PAD] brown fox jumps over the lazy dog, and [PAD] the dog looks on. "


@pytest.fixture
def model(offline_root: Path, tmp_path: Path) -> Path:
    """The tiny model as many fine-tunings left theirs: one token more than embeddings, and the config pads with it."""
    from infra.offline.default import OfflineDefault

    source = OfflineDefault(offline_root).folder("slimline/tiny-random-llama")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_bytes())
    assert tokenizer.pad_token_id == config["vocab_size"] == len(tokenizer) - 1
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.pad_token_id}))
    return folder


@pytest.mark.long
def test_a_pad_token_beyond_the_embedding_the_whole_way(home: Home, model: Path, tmp_path: Path) -> None:
    texts, records = tmp_path / "texts.jsonl", tmp_path / "records.jsonl"
    texts.write_text("".join(json.dumps({"text": WORDS * 8}) + "\n" for _ in range(8)), encoding="utf-8")
    record = {"instruction": "Name [PAD] an animal.", "input": "", "output": "A [PAD] fox."}
    longer = record | {"output": WORDS}
    records.write_text("".join(json.dumps(row) + "\n" for row in (record, longer) * 4), encoding="utf-8")
    perplexity = f"{{suite: perplexity, dataset: {texts}, windows: [64], max_windows: 2}}"
    result = home.run(
        "smoke",
        [
            f"model.id={model}",
            f"calibration.data={{dataset: {texts}}}",
            f"steps.1.data={{dataset: {records}}}",
            "steps.1.num_examples=8",
            "steps.1.max_steps=1",
            f"evals=[{perplexity}, {{suite: zero_shot, tasks: [piqa], limit: 4}}]",
            "profile=null",
        ],
    )
    assert {stage.status for stage in result.stages} == {"completed"}
    made = [stage for stage in result.stages if stage.kind == "checkpoint"]
    assert [stage.name.split(":")[0] for stage in made] == ["import-model", "prune", "recover"]
    for stage in made:
        folder = home.store.path(ArtifactRef(kind="checkpoint", key=stage.key))
        config = json.loads((folder / "config.json").read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        assert config["pad_token_id"] is None
        assert max(tokenizer(WORDS)["input_ids"]) < config["vocab_size"]
        assert "[PAD]" in tokenizer.decode(tokenizer(WORDS)["input_ids"])
