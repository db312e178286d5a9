"""A tokenizer with code of its own, from the spec to the last checkpoint: refused, or trusted all the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flows.run.outcome import StagesFailed
from flows.spec.load import load_spec
from infra.artifacts.store import ArtifactRef
from infra.models.trusted_code import NOTE
from tests.flows.home import Home

CODE = """from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""
SHORT = ("profile=null", "evals=[]", "steps.1.max_steps=1")


@pytest.fixture
def model(offline_root: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer of its own, and modelling code that must not run."""
    from infra.offline.default import OfflineDefault

    source = OfflineDefault(offline_root).folder("slimline/tiny-random-llama")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "tokenization_own.py").write_text(CODE)
    (folder / "modeling_own.py").write_text("raise SystemExit('modelling code was run')\n")
    for name, changes in {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer",
        },
        "config.json": {"auto_map": {"AutoModelForCausalLM": "modeling_own.M", "AutoConfig": "modeling_own.C"}},
    }.items():  # fmt: skip
        values = json.loads((folder / name).read_bytes())
        (folder / name).write_text(json.dumps(values | changes))
    return folder


def test_code_is_run_only_where_the_spec_trusts_it(home: Home, model: Path) -> None:
    from infra.models.import_model import load_tokenizer

    overrides = (f"model.id={model}", *SHORT)
    with pytest.raises(StagesFailed, match=r"import-model: .*tokenization_own\.py.*trust_remote_code") as caught:
        home.run("smoke", overrides)
    assert caught.value.by_user
    assert [stage.status for stage in caught.value.result.stages][:2] == ["failed", "skipped"]

    result = home.run("smoke", (*overrides, "model.trust_remote_code=true"))
    assert result.stages[0].key != caught.value.result.stages[0].key
    made = [stage for stage in result.stages if stage.kind == "checkpoint"]
    assert [stage.name.split(":")[0] for stage in made] == ["import-model", "prune", "recover"]
    for stage in made:
        folder = home.store.path(ArtifactRef(kind="checkpoint", key=stage.key))
        assert (folder / NOTE).is_file()
        assert (folder / "tokenization_own.py").read_text() == CODE
        assert not (folder / "modeling_own.py").exists()
        assert load_tokenizer(folder).own
    assert home.store.manifest(ArtifactRef(kind="checkpoint", key=made[0].key)).request["trust_remote_code"] is True


def test_the_word_is_off_unless_the_spec_says_it() -> None:
    assert load_spec("smoke").model.trust_remote_code is False
    assert load_spec("smoke", ["model.trust_remote_code=true"]).model.trust_remote_code is True
