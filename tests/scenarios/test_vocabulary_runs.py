"""A smaller vocabulary in a run: what follows has its tokens, records say so, and a file for llama.cpp is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from infra.models.gguf_header import read_gguf_header
from infra.models.import_model import load_tokenizer
from pruning.calibration import CalibrationSet
from pruning.checkpoints.save_load import load_checkpoint
from pruning.errors import PruningError
from tasks.exporting.hf_folder import export_hf_folder
from tests.flows.home import Home
from tests.flows.run.test_compress import checkpoint_runs, not_cached

SMALLER = "{{method: vocabulary, sparsity: {}, data: {{dataset: slimline/news}}, num_tokens: 2000}}"
EVALS = (
    "evals=[{suite: perplexity, dataset: slimline/wikipedia, config: null, windows: [64], max_windows: 2, "
    "normalise: [byte]}]"
)


def test_what_follows_has_the_tokens_of_the_smaller_vocabulary(
    smoke_copy: Home, filled: list[str], tmp_path: Path
) -> None:
    with pytest.raises(PruningError, match=r"sparsity 0\.9 would leave 128 of a vocabulary of 1000, of which 257 must"):
        smoke_copy.run("smoke", [f"steps=[{SMALLER.format(0.9)}]", "profile=null"])
    assert filled == []
    steps = f"steps=[{SMALLER.format(0.2)}, {{method: magnitude, sparsity: 0.3}}]"
    asked = [steps, EVALS, "profile=null", "exports=[{format: gguf}]"]
    result = smoke_copy.run("smoke", asked)
    names = ("dense", "vocabulary-20", "magnitude-30")
    expected = {*(f"evaluate:perplexity:{name}" for name in names), "prune:vocabulary-20", "prune:magnitude-30"}
    expected |= {"calibrate:vocabulary-20", "order:vocabulary-20", "export:gguf-f16:magnitude-30"}
    assert set(filled) == expected
    folders = {stage.name: smoke_copy.store.root / stage.kind / stage.key for stage in result.stages}
    small = folders["prune:magnitude-30"]
    config, tokenizer = load_checkpoint(small).config, load_tokenizer(small)
    assert config.vocab_size == len(tokenizer) == 768
    assert config.eos_token_id == tokenizer.eos_token_id
    windows = CalibrationSet.load(folders["calibrate:vocabulary-20"]).input_ids_NL
    assert 500 < windows.max() < 768
    assert tokenizer.decode(windows[0]).isprintable() or "\n" in tokenizer.decode(windows[0])
    report = json.loads((folders["prune:vocabulary-20"] / "pruning.json").read_text(encoding="utf-8"))
    assert (report["num_rows"], report["kept_rows"], report["layers"]) == (1000, 768, [])
    assert read_gguf_header(folders["export:gguf-f16:magnitude-30"] / "model.gguf").values["general.architecture"]

    export_hf_folder(folders["prune:vocabulary-20"], tmp_path / "hf", {}, (), stock=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").get_vocab() == tokenizer.get_vocab()

    own = {}
    for row in smoke_copy.results.metrics(result.run_key):
        own[row.checkpoint, row.metric] = json.loads(row.protocol).get("vocabulary")
    key = folders["prune:vocabulary-20"].name
    assert own == {
        (name, metric): key if metric == "ppl@64" and name != "dense" else None
        for name in names
        for metric in ("ppl@64", "byte_ppl@64", "bits_per_byte@64")
    }
    rows = {row.checkpoint: row for row in smoke_copy.results.checkpoints(result.run_key)}
    assert (rows["vocabulary-20"].sparsity, rows["vocabulary-20"].total_sparsity) == (None, None)
    assert (rows["magnitude-30"].method, rows["magnitude-30"].total_sparsity) == ("vocabulary+magnitude", 0.3)
    assert rows["vocabulary-20"].num_decoder_parameters == rows["dense"].num_decoder_parameters
    said = checkpoint_runs(smoke_copy, result)["magnitude-30"].data.params
    assert (said["method"], said["sparsity"]) == ("vocabulary+magnitude", "0.2+0.3")
    assert not_cached(smoke_copy.run("smoke", asked)) == set()
