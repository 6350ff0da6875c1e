"""The Hugging Face Hub: files of a repository are fetched from it, and published in one commit.

The only module that connects to it. The client, `huggingface_hub`, finds the access token (`hf auth login`, or
HF_TOKEN), the address (HF_ENDPOINT) and the cache (HF_HOME), and tries again where a connection fails.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from music_ar.ranges import shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
"""The file that the Hub shows as the card of a model."""

_MADE_BY_THE_HUB = {".gitattributes"}  # in a repository that is otherwise empty
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to an access token"


class HubError(ValueError):
    """The Hub cannot be reached, or refuses; the message says why and what to do."""


def fetch(repository: str, names: Collection[str]) -> Path:
    """Fetch some files of a repository, those that it has; without a connection, what was fetched before.

    Args:
        repository: "owner/name".
        names: of the files.

    Returns:
        The folder with the files, in the cache of the Hub's client.

    Raises:
        HubError: there is no such repository, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download  # takes long to import

    try:
        return Path(snapshot_download(repository, allow_patterns=[*names]))
    except Exception as error:  # the client raises network, HTTP and file errors of many classes
        raise HubError(_reason(error)) from error


def check_name(repository: str) -> None:
    """Check that a repository may have this name.

    Raises:
        HubError: it may not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        is_valid = repository.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise HubError(
            "a repository of the Hub has a name such as owner/name, in letters, digits, '-', '_' and '.'; got "
            f"{shown(repository)}"
        )


def publish(
    repository: str, files: Mapping[str, bytes | Path], *, stale: Collection[str], private: bool, update: bool
) -> str:
    """Publish files in one commit: the repository has all of them, or is as it was.

    Args:
        repository: "owner/name"; created if it is missing.
        files: content, or path of the content, by name.
        stale: names of files that are removed, if the repository has them and `files` does not.
        private: whether nobody else may see it: a new repository is made so, an old one must be. If not, a new one is
            as the owner's settings say.
        update: whether a repository that has files already is changed.

    Returns:
        The address of the commit.

    Raises:
        HubError: there is no access token, or it is not enough; the name is taken, or everybody can see it; the upload
            failed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise HubError(f"pushing to the Hub needs an account there: {_LOG_IN}")
    api = HfApi(library_name="music-ar")
    present, parent, is_private = _open(api, repository, private)
    if private and not is_private:
        raise HubError(
            f"{repository} exists already, and everybody can see it: choose another name, or make it private"
        )
    if present - _MADE_BY_THE_HUB and not update:
        raise HubError(
            f"{repository} exists already: choose another name, or replace its model in a new commit with --update"
        )
    added = [CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()]
    removed = [CommitOperationDelete(name, is_folder=False) for name in sorted(present & set(stale) - files.keys())]
    try:
        # With its parent, the commit is refused if somebody else has changed the repository in the meantime.
        commit = api.create_commit(
            repository, [*added, *removed], commit_message="Upload a model with music-ar", parent_commit=parent
        )
    except Exception as error:  # as in `fetch`
        raise HubError(
            f"{repository} could not be uploaded: {_reason(error)}; a push is one commit, so nothing is half-done: "
            "repeat the command"
        ) from error
    return commit.commit_url


def _open(api: "HfApi", repository: str, private: bool) -> tuple[set[str], str | None, bool]:
    """Create a repository, unless it exists; the names of its files, its newest commit, and whether it is private."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        try:
            api.create_repo(repository, private=private or None)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:  # it exists
                raise
        info = api.model_info(repository)
    except Exception as error:  # as in `fetch`
        raise HubError(f"{repository} could not be opened on the Hub: {_reason(error)}") from error
    return {file.rfilename for file in info.siblings or ()}, info.sha, bool(info.private)


def _reason(error: BaseException) -> str:
    """What went wrong, in one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    while isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the client says only that something failed
    if isinstance(error, OfflineModeIsEnabled):
        return "the variable HF_HUB_OFFLINE forbids connections"
    if isinstance(error, HfHubHTTPError):
        return _of_answer(error, error.response.status_code)
    return _one_line(error)


def _of_answer(error: Any, status: int) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"its owner gives access on request: ask for it on the Hub, then {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no such repository, or it is private: check the name, or {_LOG_IN} that may read it"
    said = error.server_message or _one_line(error)
    known = {
        401: f"the access token is wrong or has expired: {_LOG_IN}",
        403: f"the access token does not allow it ({said}): {_LOG_IN} that may write there",
        412: "somebody else has changed the repository in the meantime",
        429: "the Hub got too many requests: wait some minutes",
    }
    return known.get(status, f"the Hub answers with error {status} ({said})")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
