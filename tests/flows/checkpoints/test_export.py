"""`slimline export --format hf`: what others load, the card beside it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flows.checkpoints.public import public
from infra.artifacts.store import ArtifactRef
from infra.models.gguf_header import read_gguf_header
from infra.models.licence import Licence, licence_of, licence_texts
from pruning.checkpoints.plain_folder import write_plain_folder
from pruning.checkpoints.save_load import load_checkpoint
from pruning.errors import PruningError
from tests.flows.checkpoints.conftest import BASE, Command
from tests.flows.recorded_runs import Records
from tests.tasks.exporting.kinds import TEMPLATE
from tests.tiny import random_ids, tiny_model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=random_ids(model)).logits
    return found


@pytest.fixture(scope="module")
def folder(recorded: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote of the uneven checkpoint."""
    from flows.checkpoints.export import export_hf
    from flows.checkpoints.find import find_checkpoint

    found = find_checkpoint(recorded.results, recorded.store, "tiny", "tuned")
    out = tmp_path_factory.mktemp("out") / "plain"
    export_hf(found, recorded.results, recorded.settings, out, stock=False)
    return out


def test_transformers_alone_loads_it_with_equal_logits(folder: Path, recorded: Records) -> None:
    stored = recorded.store.path(ArtifactRef(kind="checkpoint", key="prune-tuned"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(loaded).__module__.startswith("transformers_modules")
    torch.testing.assert_close(logits(loaded), logits(load_checkpoint(stored)), rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("The lazy dog").input_ids[0] == tokenizer.bos_token_id
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {"config.json", "model.safetensors", "modeling_slimline.py", "plan.json", "README.md", "LICENSE"}
    assert "manifest.json" not in names
    config = json.loads((folder / "config.json").read_bytes())
    assert not any(name.startswith("_") for name in config)
    assert (
        config["rope_theta"] == config["rope_parameters"]["rope_theta"] == loaded.config.rope_parameters["rope_theta"]
    )
    assert json.loads((folder / "tokenizer_config.json").read_bytes())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*")} - {0o755} == {0o644}


def test_the_card_says_what_it_is(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "finetune"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny", "LICENSE")
    assert data["tags"] == ["pruned", "structured-pruning", "slimgpt", "lora", "slimline"]
    assert data["datasets"] == ["allenai/c4", "yahma/alpaca-cleaned"]
    for part in (
        "# Tiny-Llama pruned by slimgpt, 20 %, then lora",
        "| layers of the base model | query heads | kv heads | FFN channels |",
        "removed | removed |",
        "KV cache",
        "calibration set: data {",
        "| piqa acc | 0.650 | 0.650 |",
        "limit 20",
        "trust_remote_code=True",
    ):
        assert part in text, text
    assert "/srv/secret" not in text


def test_its_figures_are_there_for_the_hub_and_for_lm_eval(folder: Path) -> None:
    (file,) = (folder / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8")))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("baber/piqa", "piqa", 0.65)
    (results,) = folder.glob("results_*.json")
    assert json.loads(results.read_bytes())["results"]["piqa"]["acc,none"] == 0.65


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("export", "tiyn", "--format", "hf"), "did you mean 'tiny'"),
        (("export", "tiny", "--format", "hf", "--checkpoint", "slimgpt-02"), "there are: dense, slimgpt-20, tuned"),
        (("export", "branches", "--format", "hf"), "choose one with --checkpoint: dense, slimgpt-20, slimgpt-50"),
        (("export", "branches", "--format", "hf", "--checkpoint", "slimgpt-50"), "slimline retry branches"),
        (("export", "tiny", "full", "--format", "hf"), "is not overwritten"),
        (("export", "tiny", "no/such/place", "--format", "hf"), "does not exist"),
        (("export", "tiny", "one", "--out", "two"), "give one of them"),
        (("export", "tiny", "--checkpoint", "dense"), "a bundle has all checkpoints"),
        (("export", "tiny", "--format", "hf-uniform"), "prune with `uniform: true`"),
        (("export", "tiny", "--format", "onnx"), "optimum-onnx (0.1.0) needs transformers below 4.58"),
        (("export", "tiny", "--type", "q8_0"), "--type q8_0 is of GGUF files: add --format gguf"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    arguments: tuple[str, ...], sentence: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    answer = command(*arguments)
    assert answer.startswith("REFUSED")
    assert sentence in answer
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_is_dense_is_a_stock_folder(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("export", "tiny", "--format", "hf-uniform", "--checkpoint", "dense", "--json")
    assert json.loads(said.splitlines()[-1])["out"] == str(tmp_path / "tiny-dense")
    assert json.loads((tmp_path / "tiny-dense/config.json").read_bytes())["model_type"] == "llama"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-dense")), logits(tiny_model("llama", layers=4))
    )


def test_weights_come_in_files_of_the_asked_size(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(source)
    out.mkdir()
    write_plain_folder(source, out, max_shard_bytes=60_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 70_000 for file in files)
    names = [name for file in files for name in safe_open(file, framework="pt").keys()]  # noqa: SIM118
    assert len(names) == len(set(names)) == len(model.state_dict()) - 1  # the head is the embeddings
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


def test_a_generation_config_that_transformers_refuses_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    wrong = {"max_new_tokens": -1}
    (tmp_path / "source/generation_config.json").write_text(json.dumps(wrong), encoding="utf-8")
    (tmp_path / "out").mkdir()
    with pytest.raises(PruningError, match=r"generation_config\.json has a value.*import it again"):
        write_plain_folder(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    "head, licence",
    [
        ("license: Apache-2.0", Licence("apache-2.0")),
        ("license: [mit]", Licence("mit")),
        ("license_name: own\nlicense_link: https://x.org/l", Licence("other", "own", "https://x.org/l")),
        ("tags: [a]", None),
        ("license: {a: b", None),
    ],
)
def test_the_licence_is_that_of_the_card(head: str, licence: Licence | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\ntext\n", encoding="utf-8")
    for name in ("LICENSE", "Notice.txt", "USE_POLICY.md", "licenses.json"):
        (tmp_path / name).touch()
    assert licence_of(tmp_path) == licence
    assert {file.name for file in licence_texts(tmp_path)} == {"LICENSE", "Notice.txt", "USE_POLICY.md"}


def test_nothing_of_this_machine_is_public() -> None:
    assert public({"a": ["read /mnt/me/texts/train.jsonl, ~/x/y and hf_abcdefghijklmnopqrstuvwxyz"]}) == {
        "a": ["read train.jsonl, y and ***"]
    }
    for text in ("https://huggingface.co/a/b", "allenai/c4", "and/or", "decode / dense", "20 / 30", "</s>"):
        assert public(text) == text


def test_a_gguf_file_says_where_it_comes_from(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("export", "tiny", "--format", "gguf", "--type", "q8_0", "--json")
    (file,) = tmp_path.glob("*.gguf")
    assert file.name == "tiny-tuned-Q8_0.gguf"
    assert "note: " in said
    values = read_gguf_header(file).values
    assert values["general.architecture"] == "deci"
    assert (values["general.license"], values["general.license.name"]) == ("other", "tiny")
    assert values["general.base_model.0.repo_url"] == f"https://huggingface.co/{BASE}"
    assert (values["slimline.method"], values["slimline.recovery"]) == ("slimgpt", "lora")
    assert values["slimline.sparsity"] == pytest.approx(0.2)
    assert licence_of(file) == Licence("other", "tiny", "LICENSE")
    assert "tiny-tuned-Q8_0.gguf is there already" in command("export", "tiny", "--format", "gguf", "--type", "q8_0")
