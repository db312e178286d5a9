"""`slimline push`: what the hub gets, and what is refused; no token is ever told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.flows.checkpoints.conftest import BASE, Command
from tests.infra.writable_hub import WritableHub, writable_hub

TOKEN = "hf_" + "abcdefghij" * 3


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with writable_hub() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", found.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_a_checkpoint_becomes_a_private_repository(hub: WritableHub, command: Command) -> None:
    said = command("push", "tiny", "--repo", "me/small")
    assert "is in me/small (private)" in said
    assert f"{hub.endpoint}/me/small/commit/1" in said
    assert TOKEN not in said
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.private == {"me/small": True}
    files = hub.files["me/small"]
    assert files.keys() >= {"README.md", "model.safetensors", "config.json", "modeling_slimline.py", "tokenizer.json"}
    assert f"base_model: {BASE}" in files["README.md"].decode()
    assert json.loads(files["config.json"])["model_type"] == "slimline-llama"


def test_public_only_if_asked(hub: WritableHub, command: Command) -> None:
    assert "everybody sees it" in command("push", "tiny", "--repo", "me/open", "--public", "--checkpoint", "dense")
    assert hub.private == {"me/open": False}
    refused = command("push", "tiny", "--repo", "me/open", "--checkpoint", "slimgpt-20")
    assert refused.startswith("REFUSED me/open is there already and public: add --public")
    assert json.loads(hub.files["me/open"]["config.json"])["model_type"] == "llama"


@pytest.mark.parametrize("status, sentence", [(403, "does not let you write to me/small"), (400, "refused the upload")])
def test_what_the_hub_refuses_is_said(status: int, sentence: str, hub: WritableHub, command: Command) -> None:
    hub.refuses = status
    refused = command("push", "tiny", "--repo", "me/small")
    assert refused.startswith("REFUSED the hub")
    assert sentence in refused
    assert TOKEN not in refused
    assert hub.files == {}


@pytest.mark.parametrize(
    "repo, token, sentence",
    [
        ("small", TOKEN, "is no name of a repository"),
        ("me/small", "", "nobody is logged in on the hub: `hf auth login`"),
    ],
)
def test_nothing_is_asked_without_a_name_or_a_token(
    repo: str, token: str, sentence: str, hub: WritableHub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    assert sentence in command("push", "tiny", "--repo", repo)
    assert hub.tokens == set()
