"""From a local directory to the hub: all of it in one commit, or nothing."""

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from eqx_transformers import serialisation

from .checkpoint import open_directory
from .convert import Source
from .errors import ConversionError, MalformedCheckpoint, NotPushed
from .export import EARLIER
from .hub import get_broken_connection, import_hub

LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or pass token=; the token needs write access."
NOTHING = "Nothing was committed."
AGAIN = "Run again; large files that have arrived are not sent twice."  # of an answer that was lost, nothing is known
# Of programs that were writing; hidden files and directories are left out too.
TEMPORARY = ("*.partial", "*.incomplete", "*.tmp", "*.lock", "*~", "__pycache__")


def push(
    directory: Source,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a Hugging Face directory to the hub in one commit, and returns the URL of that commit.

    The repository is made if it is not there (`private`: as such). All files go, but for hidden and temporary ones;
    weights of an earlier model that are not in the directory are deleted in the same commit, other files stay. What
    is pushed is checked first, from headers. Raises a `MalformedCheckpoint` (or what else reading it raises) for a
    directory that is not a whole Hugging Face model, and a `NotPushed` where the hub cannot be reached or does
    not take it: no login, no right to write, no such namespace or revision. Nothing is committed then.
    """
    import_hub()
    import huggingface_hub as hub

    directory = Path(directory)
    files = _expect_whole(directory)
    api = hub.HfApi(endpoint=hub.constants.ENDPOINT, token=token, library_name="eqx_transformers")
    with _explained(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _expect_private(api, repo_id, private)
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in there if name not in files and any(fnmatch(name, one) for one in EARLIER)]
        operations = [
            *(hub.CommitOperationDelete(name) for name in stale if "/" not in name),
            *(hub.CommitOperationAdd(name, path) for name, path in files.items()),
        ]
        message = commit_message or f"Upload {directory.resolve().name}"
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


def _expect_whole(directory: Path) -> dict[str, Path]:
    """What to upload, by its name in the repository."""
    if serialisation.is_native(directory):
        raise MalformedCheckpoint(
            f"{directory} is in the native format, which the hub's other readers do not know. Export it first:"
            f" converters.export(model, 'DIR'), or python -m converters.hf {directory} --export DIR; then push DIR."
        )
    if directory.name.startswith(".") and directory.suffix in (".partial", ".old"):
        raise MalformedCheckpoint(
            f"{directory} is what a write that was killed left behind. Delete it, export again, and push the result."
        )
    open_directory(directory)
    names = {p.relative_to(directory): p for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name.as_posix(): path for name, path in names.items() if not any(map(_is_left_out, name.parts))}


def _is_left_out(part: str) -> bool:
    return part.startswith(".") or any(fnmatch(part, one) for one in TEMPORARY)


def _expect_private(api: Any, repo_id: str, private: bool | None) -> None:
    """The hub ignores the wish for a repository that is there: nothing is published by mistake."""
    if private and not api.repo_info(repo_id).private:
        raise ConversionError(
            f"{repo_id} is there already, and is public: private=True cannot change that, so nothing was pushed. Make"
            f" it private in its settings ({api.endpoint}/{repo_id}/settings), or choose another name."
        )


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise NotPushed(f"{repo_id!r} is not a hub id, NAME or OWNER/NAME ({error}).") from error
    except errors.OfflineModeIsEnabled as error:
        raise NotPushed(f"{repo_id} cannot be pushed to: HF_HUB_OFFLINE is set. Unset it.") from error
    except errors.LocalTokenNotFoundError as error:
        raise NotPushed(f"{repo_id} cannot be pushed to without a login. {LOG_IN}") from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo_id, revision, error) from error
    except get_broken_connection() as error:
        raise NotPushed(
            f"{repo_id}: the connection to {constants.ENDPOINT} failed ({_in_one_line(error)}). {AGAIN} Check the"
            " connection and HF_ENDPOINT."
        ) from error
    except ConversionError:
        raise
    except ValueError as error:  # of README.md, or of an answer that is not the hub's
        raise NotPushed(f"{repo_id}: {_in_one_line(error)} {NOTHING}") from error
    except RuntimeError as error:  # of one file, in huggingface_hub's own words
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(repo_id, revision, cause) from error
        raise NotPushed(f"{repo_id}: {_in_one_line(error)} ({_in_one_line(cause or error)}). {AGAIN}") from error


def _refused(repo_id: str, revision: str | None, error: Any) -> ConversionError:
    """The hub answered, with an error."""
    from huggingface_hub import constants, errors

    status, said = error.response.status_code, (error.server_message or "").partition("\n")[0]
    said = f"{status}: {said}" if said else str(status)
    if isinstance(error, errors.RevisionNotFoundError):
        return NotPushed(
            f"{repo_id} has no branch {revision!r}. Make it first: huggingface_hub.create_branch({repo_id!r},"
            f" branch={revision!r})."
        )
    if status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        return NotPushed(f"The hub does not know you, or {repo_id} is not yours ({said}). {LOG_IN}")
    if status in (402, 403):
        return NotPushed(
            f"The hub does not let you write {repo_id} ({said}). Is OWNER your name, or an organization in which you"
            f" may write? {NOTHING} {LOG_IN}"
        )
    if status == 404:
        return NotPushed(
            f"{constants.ENDPOINT} has no place for {repo_id} (404): no such namespace, or not a server that takes"
            " uploads. Check OWNER and HF_ENDPOINT."
        )
    if status in (409, 412):
        return NotPushed(f"{repo_id} was changed by somebody else at the same time ({said}). {NOTHING} {AGAIN}")
    return NotPushed(f"The hub answered {said} to the upload to {repo_id}. {AGAIN}")


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
