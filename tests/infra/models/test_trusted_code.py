"""Code that comes with a model or data set: run for the tokenizer of a model that the spec trusts, and never else."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra.errors import SourceInvalid, SourceMissing
from infra.models.import_model import describe, import_model, load_tokenizer
from infra.models.trusted_code import NOTE, hand_on_trusted_code, is_trusted
from infra.settings import Settings
from infra.sources.find import Sources, TextData, sources_from
from infra.sources.located import Located
from tests.infra.fake_hub import fake_hub
from tests.infra.sources.test_find import python

TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from .mark import MARK

Path(MARK).write_text("run")


class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_bytes()) if file.is_file() else {}
    file.write_text(json.dumps(values | changes))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that foreign code writes when it is run."""
    return tmp_path / "foreign code was run"


@pytest.fixture
def model(offline: Sources, tmp_path: Path, mark: Path) -> Path:
    """A model whose tokenizer, config and decoder come with code of their own."""
    source = offline.find("slimline/tiny-random-llama", "model").folder
    assert source is not None
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "mark.py").write_text(f"MARK = {str(mark)!r}\n")
    (folder / "tokenization_own.py").write_text(TOKENIZER)
    (folder / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w').write('run')\n")
    code = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit(folder / "config.json", auto_map=code)
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def at(folder: Path) -> Located:
    return Located(str(folder), "model", folder, None, "local path")


def stock_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "auto_map"}))


def test_a_tokenizer_that_needs_its_code_is_refused_and_the_file_named(model: Path, out: Path, mark: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"\(tokenization_own\.py\).*set model\.trust_remote_code to true"):
        import_model(at(model), out, "auto")
    assert not mark.exists()


def test_modelling_code_neither_runs_nor_travels(model: Path, out: Path, mark: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    stock_tokenizer(model)
    import_model(at(model), out, "auto")
    assert list(out.glob("*.py")) == []
    assert "auto_map" not in json.loads((out / "config.json").read_bytes())
    AutoConfig.from_pretrained(out, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert not mark.exists()


def test_a_trusted_tokenizer_travels_with_its_code(model: Path, out: Path, mark: Path, tmp_path: Path) -> None:
    import_model(at(model), out, "auto", trust_remote_code=True)
    assert mark.exists()
    assert sorted(file.name for file in out.glob("*.py")) == ["mark.py", "tokenization_own.py"]  # no modelling code
    assert "auto_map" not in json.loads((out / "config.json").read_bytes())
    assert is_trusted(out)
    assert load_tokenizer(out).own
    derived = tmp_path / "derived"
    load_tokenizer(out).save_pretrained(derived)
    shutil.copyfile(out / "config.json", derived / "config.json")
    hand_on_trusted_code(out, derived)
    mark.unlink()
    tokenizer = load_tokenizer(derived)
    assert tokenizer.own
    assert tokenizer.encode("a b") == load_tokenizer(out).encode("a b")


def test_code_that_changed_since_is_not_run(model: Path, out: Path, mark: Path) -> None:
    import_model(at(model), out, "auto", trust_remote_code=True)
    (out / "mark.py").write_text("MARK = 'elsewhere'\n")
    with pytest.raises(SourceInvalid, match=r"mark\.py is not the code that the spec trusted"):
        load_tokenizer(out)


def test_a_model_cannot_bring_a_note_of_its_own(model: Path, out: Path, mark: Path, tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    import_model(at(model), tmp_path / "aside", "auto", trust_remote_code=True)
    mark.unlink()
    shutil.copyfile(tmp_path / "aside" / NOTE, model / NOTE)
    (model / "manifest.json").write_text("{}")
    with pytest.raises(SourceInvalid, match="is code of its own"):
        import_model(at(model), out, "auto")
    assert not mark.exists()
    assert not (out / NOTE).exists()
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("reference", ["other/repository--tokenization_own.OwnTokenizer", "../x.Own", "missing.Own"])
def test_trusted_code_lies_in_the_model_s_own_folder(model: Path, out: Path, mark: Path, reference: str) -> None:
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [reference, None]})
    with pytest.raises(SourceInvalid, match="whose code does not lie beside it"):
        import_model(at(model), out, "auto", trust_remote_code=True)
    assert not mark.exists()


def test_trust_without_code_changes_nothing(
    model: Path, out: Path, mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock_tokenizer(model)
    with caplog.at_level(logging.WARNING):
        import_model(at(model), out, "auto", trust_remote_code=True)
    assert "has no code of its own" in caplog.text
    assert not is_trusted(out)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_does_not_choose_kernels_of_the_hub(model: Path, out: Path, key: str) -> None:
    stock_tokenizer(model)
    edit(model / "config.json", **{key: "somebody/kernels"})
    import_model(at(model), out, "auto")
    assert "somebody/kernels" not in (out / "config.json").read_text()


def test_an_adapter_does_not_send_the_loader_to_another_model(model: Path, out: Path) -> None:
    stock_tokenizer(model)
    edit(model / "adapter_config.json", base_model_name_or_path="/some/other/model", peft_type="LORA")
    with pytest.raises(SourceInvalid, match="makes transformers load another model"):
        import_model(at(model), out, "auto")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl"])
def test_pickles_of_every_name_are_refused(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(SourceInvalid, match=rf"only pickled weights \({name}\)"):
        describe(at(model))


def test_sharded_pickles_are_refused(model: Path, out: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceInvalid, match="only pickled weights"):
        import_model(at(model), out, "auto")


def test_pickles_beside_safetensors_stay_behind(model: Path, out: Path) -> None:
    stock_tokenizer(model)
    for name in ("pytorch_model.bin", "optimizer.pt", "state.pkl", "x.npy", "native.so", "x.pickle"):
        (model / name).write_bytes(b"never read")
    import_model(at(model), out, "auto")
    assert {file.suffix for file in out.iterdir()} <= {".json", ".safetensors", ".txt", ".md", ".jinja", ".model"}


def test_a_data_set_that_is_a_script_is_refused(settings: Settings, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "mirror" / "owner" / "script"
    folder.mkdir(parents=True)
    (folder / "script.py").write_text(f"open({str(mark)!r}, 'w')\n")
    sources = sources_from(str(tmp_path / "mirror"), settings)
    with pytest.raises(SourceInvalid, match="is a loading script, and code of a data set is never run"):
        sources.texts(TextData(dataset="owner/script"))
    with pytest.raises((SourceInvalid, SourceMissing)):
        sources.texts(TextData(dataset=str(folder / "script.py")))
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    assert sources_from(str(tmp_path / "mirror"), settings).texts(TextData(dataset="owner/script")) == ["a"]
    assert not mark.exists()


def test_a_data_set_on_the_hub_that_is_a_script_is_refused(tmp_path: Path) -> None:
    code = (
        "from infra.settings import load_settings; from infra.sources.find import TextData, sources_from\n"
        "sources_from('hub', load_settings()).texts(TextData(dataset='owner/script'))"
    )
    with fake_hub("dataset", "owner/script", {"script.py": b"raise SystemExit('run')"}) as endpoint:
        done = python(code, tmp_path, endpoint)
    assert "is a loading script, and code of a data set is never run" in done.stderr


def test_a_pruned_model_gets_our_modelling_file_whatever_it_brought(model: Path, out: Path, mark: Path) -> None:
    from pruning.checkpoints.folder import with_own_modelling_file_
    from pruning.modeling import modeling_slimline

    stock_tokenizer(model)
    (model / "modeling_slimline.py").write_text((model / "modeling_own.py").read_text())
    edit(model / "config.json", model_type="slimline-llama", per_layer_config={})
    import_model(at(model), out, "auto")
    assert list(out.glob("*.py")) == []
    with_own_modelling_file_(out)
    assert (out / "modeling_slimline.py").read_text() == Path(modeling_slimline.__file__).read_text()
    named = json.loads((out / "config.json").read_bytes())["auto_map"]
    assert named["AutoModelForCausalLM"] == "modeling_slimline.SlimlineLlamaForCausalLM"
    assert named["AutoConfig"] == "modeling_slimline.SlimlineLlamaConfig"
    assert not mark.exists()
