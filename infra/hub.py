"""The Hugging Face hub: whether a repository is there, at which commit, the files of a model; and uploading one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infra.errors import SourceInvalid, SourceMissing, UploadRefused

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo

RepoType = Literal["model", "dataset"]

# Seconds for one metadata request. The client's own default retries and may sit for a minute behind a silent firewall.
_TIMEOUT = 8.0

# Pickled weights run code when loaded; "*.py" is only copied along, never executed by us.
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")


class Unreachable(SourceMissing):
    """The hub did not answer: worth another try, unlike its "no"."""


def resolve(repo_id: str, repo_type: RepoType, revision: str | None) -> str:
    """Commit hash of `revision` (default: main): one metadata request, or what the local Hugging Face cache knows.

    Raises Unreachable when the hub does not answer and the cache has no copy, SourceMissing when the hub answers "no".
    """
    try:
        commit: str | None = _info(repo_id, repo_type, revision).sha
    except Unreachable:
        cached = _cached_commit(repo_id, repo_type, revision)
        if cached is None:
            raise
        return cached
    assert commit is not None, f"the hub gave no commit for {repo_id}"
    return commit


def model_files(repo_id: str, revision: str | None) -> dict[str, int]:
    """Names at the top of a model repository and their sizes in bytes.

    Empty if the hub does not answer now (cached copy).
    """
    try:
        siblings = _info(repo_id, "model", revision, sizes=True).siblings or []
    except Unreachable:
        return {}
    return {entry.rfilename: entry.size or 0 for entry in siblings if "/" not in entry.rfilename}


def download_file(repo_id: str, filename: str, revision: str | None) -> Path | None:
    """One small file of a model repository, or None if it has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, etag_timeout=_TIMEOUT))
    except LocalEntryNotFoundError as error:  # "no answer"; before its base EntryNotFoundError, "no such file"
        raise Unreachable(f"the hub did not answer while {filename} of {repo_id} was asked for") from error
    except EntryNotFoundError:
        return None


def download_model(repo_id: str, revision: str | None) -> Path:
    """A folder with config, tokenizer and weights (safetensors, else the only GGUF file) at exactly that revision.

    Raises SourceInvalid for a repository with pickled weights only, Unreachable when the hub does not answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    names = model_files(repo_id, revision)
    patterns = list(_MODEL_FILES)
    if names and not any(name.endswith(".safetensors") for name in names):
        patterns.append(_only_gguf(repo_id, names))
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, etag_timeout=_TIMEOUT))
    except LocalEntryNotFoundError as error:
        raise Unreachable(f"the hub did not answer while {repo_id} was downloaded; run again to continue it") from error


def _only_gguf(repo_id: str, names: dict[str, int]) -> str:
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise SourceInvalid(
            f"the hub's {repo_id} has {len(ggufs)} GGUF files ({', '.join(ggufs[:4])}, ...); download one and give "
            "its path as the model"
        )
    raise SourceInvalid(
        f"the hub's {repo_id} has no safetensors weights; pickled ones (.bin, .pt) are refused, since loading them "
        "runs code"
    )


def _info(repo_id: str, repo_type: RepoType, revision: str | None, sizes: bool = False) -> ModelInfo | DatasetInfo:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        ask = api.model_info if repo_type == "model" else api.dataset_info
        return ask(repo_id, revision=revision, timeout=_TIMEOUT, files_metadata=sizes)
    except GatedRepoError as error:
        raise SourceMissing(
            f"{repo_id} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceMissing(f"the hub's {repo_type} {repo_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise SourceMissing(
            f"the hub knows no {repo_type} {repo_id!r} (or it is private and you are not logged in)"
        ) from error
    except HFValidationError as error:
        raise SourceMissing(f"{repo_id!r} is neither an existing path nor a possible hub id (owner/name)") from error
    except Exception as error:  # its HTTP library was requests, httpx, httpx2: their errors have no common name
        raise Unreachable(f"the hub did not answer ({error or type(error).__name__})") from error


def _cached_commit(repo_id: str, repo_type: RepoType, revision: str | None) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repo = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type=repo_type))
    ref = repo / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else (revision or "")
    return commit if commit and (repo / "snapshots" / commit).is_dir() else None


def reachable() -> bool:
    """Whether the hub answers at all, within three seconds."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import ENDPOINT

    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=3.0).close()
    except HTTPError:
        return True  # an answer, if not a kind one
    except (URLError, OSError):
        return False
    return True


def check_upload(repo_id: str, *, private: bool) -> None:
    """Raise UploadRefused or Unreachable if a model cannot be uploaded there: before any work. One or two requests.

    private: nobody but its owners is to see it, so that a repository that is there and public is refused.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if repo_id.count("/") != 1:
        raise UploadRefused(f"{repo_id!r} is no name of a repository; give owner/name, the owner being you or a group")
    if get_token() is None:
        raise UploadRefused("nobody is logged in on the hub: `hf auth login`, or set HF_TOKEN, then push again")
    with _said_of_upload(repo_id):
        try:
            there = HfApi().model_info(repo_id, timeout=_TIMEOUT)
        except RepositoryNotFoundError:
            return
    if private and not there.private:
        raise UploadRefused(
            f"{repo_id} is there already and public: add --public if everybody may see it, or give another name"
        )


def upload(folder: Path, repo_id: str, *, private: bool, message: str) -> str:
    """Upload the files of a folder as a model repository, which is made if there is none; returns the commit's address.

    Raises UploadRefused or Unreachable. Files that the repository has besides stay.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _said_of_upload(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url)


@contextmanager
def _said_of_upload(repo_id: str) -> Iterator[None]:
    """The hub's refusals in a sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise UploadRefused(f"{repo_id!r} is no name of a repository on the hub; give owner/name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UploadRefused(
                f"the hub does not let you write to {repo_id} (HTTP {status}): log in with a token that may write "
                "(`hf auth login`), or give a repository of yours"
            ) from error
        if status < 500:
            raise UploadRefused(f"the hub refused the upload to {repo_id} (HTTP {status}: {_reason(error)})") from error
        raise Unreachable(f"the hub failed while {repo_id} was uploaded (HTTP {status}); push again") from error
    except Exception as error:  # of its HTTP library, whose errors have no common name
        raise Unreachable(f"the hub did not answer ({error or type(error).__name__}); push again") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "server_message", None) or error).strip().partition("\n")[0]
