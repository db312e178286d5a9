"""Nothing that a spec, a data set or a model names lies outside the folder it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.errors import SourceInvalid, SourceMissing
from infra.models.import_model import describe
from infra.settings import Settings
from infra.sources.find import Sources, TextData, sources_from
from infra.sources.fingerprints import fingerprint
from infra.sources.safe_names import check_name, check_revision, is_repository_id, stays_inside

SECRET = "nobody may read this"


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A mirror with one data set, and beside it a file that belongs to nobody."""
    (tmp_path / "secret.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    folder = tmp_path / "mirror" / "owner" / "texts"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps({"text": "public"}) + "\n")
    return tmp_path / "mirror"


@pytest.fixture
def sources(mirror: Path, settings: Settings) -> Sources:
    return sources_from(str(mirror), settings)


def test_what_stays_inside() -> None:
    inside = ("a.jsonl", "en/c4-train.00000-of-01024.json.gz", "**/*.parquet", "a..b/c", "data/train-*.parquet")
    outside = (
        "", "../x", "a/../../x", "/etc/passwd", "~/x", "https://h/x", "zip://a::/etc/x", "a\\..\\x", "a\0b", "hf://x",
    )  # fmt: skip
    assert [path for path in inside if not stays_inside(path)] == []
    assert [path for path in outside if stays_inside(path)] == []


def test_names_of_repositories_revisions_and_splits() -> None:
    assert all(map(is_repository_id, ("gpt2", "owner/name", "HuggingFaceTB/SmolLM2-135M", "a_b/c.d")))
    assert not any(map(is_repository_id, ("../x", "a/../b", "a/b/c", "/a", "a/..", "a b/c", "a/b\n", "", ".hidden/x")))
    for revision in (None, "main", "refs/pr/3", "v1.0", "0123456789abcdef", "refs/convert/parquet"):
        assert check_revision(revision) == revision
    for revision in ("../x", "a/../../x", "/etc", "a//b", "", "a b", "x\n"):
        with pytest.raises(ValueError, match="is no name of a branch"):
            check_revision(revision)
    for name in (None, "train", "train[:10%]+validation[5:]", "wikitext-2-raw-v1", "20231101.en"):
        assert check_name(name) == name
    for name in ("../x", "a/b", "..", "a\\b", "*"):
        with pytest.raises(ValueError, match="is no name of a configuration"):
            check_name(name)


@pytest.mark.parametrize("repo_id", ["owner/../../folder", "owner/texts/../../../folder", "owner/..", "mirror/../x"])
def test_an_id_does_not_climb_out_of_the_mirror(sources: Sources, repo_id: str) -> None:
    with pytest.raises(SourceMissing, match="is neither an existing path nor an id"):
        sources.find(repo_id, "dataset")
    with pytest.raises(SourceMissing, match="is neither an existing path nor an id"):
        sources.find(repo_id, "model")


@pytest.mark.parametrize("repo_id", ["~nobody-of-that-name/x", "x" * 5000, "a\0b"])
def test_ids_that_no_path_can_be(sources: Sources, repo_id: str) -> None:
    with pytest.raises(SourceMissing):
        sources.find(repo_id, "dataset")


def test_a_revision_does_not_climb_out_of_the_hub_s_cache(sources: Sources) -> None:
    with pytest.raises(SourceMissing, match=r"has no revision '\.\./\.\./x'"):
        sources.find("owner/other", "model", revision="../../x")


@pytest.mark.parametrize("field, value", [
    ("data_files", "../../../secret.jsonl"), ("data_files", "/etc/passwd"), ("data_files", "https://h/x.jsonl"),
    ("data_files", "zip://x.jsonl::https://h/x"), ("config", "../x"), ("split", "../x"), ("revision", "../x"),
])  # fmt: skip
def test_texts_are_those_of_the_data_set(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match=r"leaves the data set|is no name of"):
        TextData.model_validate({"dataset": "owner/texts", field: value})


@pytest.mark.parametrize("configs", [
    "- {config_name: default, data_files: ../../../secret.jsonl}",
    "- {config_name: default, data_files: [{split: train, path: PARENT/secret.jsonl}]}",
    "- {config_name: default, data_files: [{split: train, path: [a.jsonl, 'https://h/x.jsonl']}]}",
    "- {config_name: default, data_files: {train: ../../../secret.jsonl}}",
    "- {config_name: default, data_dir: ../../../folder}",
])  # fmt: skip
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_a_readme_does_not_name_files_elsewhere(sources: Sources, mirror: Path, file: str, configs: str) -> None:
    card = f"configs:\n{configs.replace('PARENT', str(mirror.parent))}\n"
    (mirror / "owner/texts" / file).write_text(card if file.endswith("yaml") else f"---\n{card}---\n# texts\n")
    for ask in (lambda: sources.texts(TextData(dataset="owner/texts")), lambda: sources.folder("owner/texts")):
        with pytest.raises(SourceInvalid, match="names data files outside the data set"):
            ask()


def test_an_ordinary_readme_is_read(sources: Sources, mirror: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    (mirror / "owner/texts/README.md").write_text(f"{card}# texts\n---\nmore\n")
    assert sources.texts(TextData(dataset="owner/texts")) == ["public"]


def test_a_readme_that_says_its_files_twice_is_refused(sources: Sources, mirror: Path) -> None:
    """`datasets` takes the last and says nothing."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n  data_files: other.jsonl\n---\n"
    (mirror / "owner/texts/README.md").write_text(card)
    sentence = (
        r"README\.md of owner/texts begins with YAML that cannot be read \(line 5\): the key 'data_files' is there"
    )
    with pytest.raises(SourceInvalid, match=f"{sentence} twice, in line 4 and in line 5; take one of them out"):
        sources.texts(TextData(dataset="owner/texts"))


def test_a_mirror_may_be_made_of_links_and_their_content_counts(sources: Sources, mirror: Path) -> None:
    (mirror / "owner/linked").symlink_to(mirror.parent / "folder")
    (mirror / "owner/file").mkdir()
    (mirror / "owner/file/train.jsonl").symlink_to(mirror.parent / "secret.jsonl")
    assert sources.texts(TextData(dataset="owner/linked")) == [SECRET]
    assert sources.texts(TextData(dataset="owner/file")) == [SECRET]
    before = fingerprint(mirror / "owner/file")
    (mirror.parent / "secret.jsonl").write_text("{}")
    assert fingerprint(mirror / "owner/file") != before


def test_links_in_a_circle_are_named(mirror: Path) -> None:
    (mirror / "owner/texts/again").symlink_to(mirror / "owner")
    with pytest.raises(SourceInvalid, match="texts/again is a link to a folder that it lies in"):
        fingerprint(mirror / "owner/texts")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/x/model.safetensors", "pytorch_model.bin", "x.pt"])
def test_an_index_names_safetensors_beside_it(sources: Sources, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(SourceInvalid, match="which is no safetensors file beside it"):
        describe(sources.find(str(folder), "model"))
