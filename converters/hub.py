"""From a hub id to a local directory, through huggingface_hub and its cache."""

import contextlib
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .containers import CONTAINERS, KNOWN, Container, read_index
from .errors import MalformedCheckpoint, SourceNotFound
from .files import read_json

# Small files that make a converted or exported directory useful; a repository has some of them. Not the model card:
# README.md speaks of the repository (its numbers, its license, its name), and would be wrong beside another model.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
OTHERS = ("tf_model.h5", "model.onnx")


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Downloads what a conversion needs (or finds it in the cache) and returns its directory.

    All files are of one commit (asked for by its hash, where the hub knows hashes). The weights come last, so that a
    cache that has them has all the rest. A hub that cannot be reached is known within seconds; the cache then has to
    do. Raises `SourceNotFound` for a repository, revision or network that is not there, `MalformedCheckpoint` for a
    repository without weights that are read.
    """
    import_hub()
    repository = Repository(repo_id, revision, subfolder, token, local_files_only)
    directory, small = repository.open()
    repository.expect_one_commit(directory, [*small, *repository.get_weights()])
    return directory


class Absent(SourceNotFound):
    """The repository, or in its place the cache, does not have this file."""


class Repository:
    """One repository at one revision. `offline` says why the hub is not asked, if it is not."""

    def __init__(self, repo_id: str, revision: str | None, subfolder: str | None, token: Any, local: bool):
        self.repo_id, self.revision, self.subfolder, self.token = repo_id, revision, subfolder, token
        self.name = f"{repo_id} (revision {revision!r})" if revision else repo_id
        self.offline = "local_files_only=True" if local else self._silence()
        self.lacks: frozenset[str] = frozenset()

    def open(self) -> tuple[Path, list[Path]]:
        """(the directory of config.json, the small files); from here on, everything is of the commit of that file."""
        config = self.get("config.json")
        if self.offline is None:
            asked, self.revision = self.revision, config.parents[len(PurePosixPath(self.subfolder or "").parts)].name
            if not self._exists("config.json"):  # a mirror that knows branches only
                self.revision = asked
            self.lacks = self._ask()
        companions = [self.find(name) for name in COMPANIONS]
        modules = [self.find(name) for name in _module_configs(config.parent) if name not in COMPANIONS]
        return config.parent, [path for path in (*companions, *modules) if path is not None]

    def expect_one_commit(self, directory: Path, found: Iterable[Path]) -> None:
        if any(directory not in path.parents for path in found):
            raise SourceNotFound(f"{self.repo_id} changed while it was being downloaded. Run again, or pin a revision.")

    def _ask(self) -> frozenset[str]:
        """Which of the files that a model may have are not there: one request in the place of one for each.

        None of them where a mirror does not answer it; then each is asked for.
        """
        import huggingface_hub as hub

        names = {self._path(name): name for name in ("config.json", *COMPANIONS, *KNOWN, *OTHERS)}
        try:
            api = hub.HfApi(endpoint=hub.constants.ENDPOINT, token=self.token)
            there = {one.path for one in api.get_paths_info(self.repo_id, list(names), revision=self.revision)}
        except (hub.errors.HfHubHTTPError, ValueError, TypeError, LookupError, *get_broken_connection()):
            return frozenset()
        if self._path("config.json") not in there:  # which was downloaded: the answer is to another question
            return frozenset()
        return frozenset(name for path, name in names.items() if path not in there)

    def is_cached(self, name: str) -> bool:
        import huggingface_hub as hub

        return isinstance(hub.try_to_load_from_cache(self.repo_id, self._path(name), revision=self.revision), str)

    def get(self, name: str) -> Path:
        """A file that must be there."""
        try:
            return self._download(name)
        except Absent as error:
            raise SourceNotFound(str(error)) from error.__cause__

    def find(self, name: str) -> Path | None:
        """A file that may be there."""
        if name in self.lacks:
            return None
        try:
            return self._download(name)
        except Absent:
            return None

    def get_weights(self) -> list[Path]:
        """The weights of the container that is preferred, as in a directory."""
        for container in CONTAINERS:
            if (whole := self.find(container.weights)) is not None:
                return [whole]
            if (index := self.find(container.index)) is not None:
                names = sorted(set(read_index(index, container)[0].values()))
                return [index, *(self._shard(name, container) for name in names)]
        raise self._without_weights()

    def _shard(self, name: str, container: Container) -> Path:
        shard = self.find(name)
        if shard is None:
            raise self.without_shard(name, container)
        return shard

    def without_shard(self, name: str, container: Container) -> Exception:
        return self._unless_offline(f"{container.index} names {name}, which the repository does not have", name)

    def _without_weights(self) -> Exception:
        there = (name for name in OTHERS if name not in self.lacks and self._exists(name))
        other = None if self.offline else next(there, None)
        has = f"only {other}, a container that is not read" if other else "no weights under a known name"
        hint = "Look for a revision with safetensors (--revision), or save it as such with transformers:"
        return self._unless_offline(
            f"it has none of {', '.join(KNOWN)}, {has}. {hint} AutoModel.from_pretrained(…).save_pretrained(…)",
            KNOWN[0],
        )

    def _unless_offline(self, wrong: str, name: str) -> Exception:
        """What is wrong with the repository; of a cache, only that it lacks something can be said."""
        return SourceNotFound(self._not_cached(name)) if self.offline else MalformedCheckpoint(f"{self.name}: {wrong}.")

    def _not_cached(self, name: str) -> str:
        return (
            f"{self.name}: {name} is not in the local cache, and the hub is not asked ({self.offline}). Check the"
            " connection, HF_ENDPOINT and HF_HUB_OFFLINE, or run once while online."
        )

    def _silence(self) -> str | None:
        """Why the cache has to do, or None if the hub answers; asked once, where a download tries for half a minute."""
        import huggingface_hub as hub

        try:
            hub.get_hf_file_metadata(self.url("config.json"), token=self.token)
        except hub.errors.OfflineModeIsEnabled:
            return "HF_HUB_OFFLINE is set"
        except (hub.errors.RevisionNotFoundError, hub.errors.EntryNotFoundError):
            return None
        except hub.errors.HfHubHTTPError as error:  # an outage, a limit, a refusal: what is cached can still be used
            return f"it answered {error.response.status_code}" if self.is_cached("config.json") else None
        except get_broken_connection() as error:
            return f"{hub.constants.ENDPOINT} cannot be reached: {error or type(error).__name__}"
        return None

    def _exists(self, name: str) -> bool:
        import huggingface_hub as hub

        try:
            hub.get_hf_file_metadata(self.url(name), token=self.token)
        except (hub.errors.HfHubHTTPError, *get_broken_connection()):
            return False
        return True

    def url(self, name: str) -> str:
        import huggingface_hub as hub

        with self.explained(name):
            return hub.hf_hub_url(self.repo_id, name, subfolder=self.subfolder, revision=self.revision)

    def _download(self, name: str) -> Path:
        import huggingface_hub as hub

        with self.explained(name):
            path = hub.hf_hub_download(
                self.repo_id,
                name,
                subfolder=self.subfolder,
                revision=self.revision,
                token=self.token,
                local_files_only=self.offline is not None,
            )
        return Path(path)

    @contextlib.contextmanager
    def explained(self, name: str) -> Iterator[None]:
        from huggingface_hub import errors

        try:
            yield
        except errors.HFValidationError as error:
            raise SourceNotFound(f"{self.repo_id!r} is neither a directory here nor a hub id ({error}).") from error
        except errors.LocalEntryNotFoundError as error:
            raise self._unanswered(name, error) from error
        except errors.HfHubHTTPError as error:
            raise self._refused(name, error) from error
        except (
            RuntimeError,
            *get_broken_connection(),
        ) as error:  # RuntimeError: the hub's own transfer library, hf_xet
            raise SourceNotFound(self._broken(name, error)) from error
        except OSError as error:
            if error.errno is not None:
                raise  # of the local disk
            raise SourceNotFound(self._broken(name, error)) from error

    def _broken(self, name: str, error: BaseException) -> str:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{self.name}: the download of {name} broke off ({said}). Run again; what is complete is kept."

    def _unanswered(self, name: str, error: Exception) -> SourceNotFound:
        """The cache does not have it and the hub did not give it."""
        from huggingface_hub import constants, errors

        cause = error.__cause__
        if self.offline is not None:
            return Absent(self._not_cached(name))
        if isinstance(cause, errors.HfHubHTTPError):
            return self._refused(name, cause)
        if isinstance(cause, errors.FileMetadataError):
            return SourceNotFound(
                f"{constants.ENDPOINT} does not answer as the hub does for {self.name}: no commit or ETag in the"
                f" headers of {name}. Check HF_ENDPOINT, or the proxy in between."
            )
        return SourceNotFound(self._broken(name, cause or error))

    def _refused(self, name: str, error: Any) -> SourceNotFound:
        """The hub answered, with an error."""
        from huggingface_hub import constants, errors

        status = getattr(error.response, "status_code", None)
        if isinstance(error, errors.RevisionNotFoundError):
            return SourceNotFound(f"{self.repo_id} has no revision {self.revision!r} (a branch, tag or commit).")
        if isinstance(error, errors.GatedRepoError):
            return SourceNotFound(
                f"{self.name} is gated: accept its terms on {constants.ENDPOINT}/{self.repo_id}. {LOG_IN}"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return SourceNotFound(
                f"The hub has no repository {self.repo_id!r} for you, and there is no directory of that name here."
                f" Check the spelling; if it is private: {LOG_IN}"
            )
        if isinstance(error, errors.EntryNotFoundError):
            return Absent(f"{self.name} has no {self._path(name)}: it is not a transformers model.")
        if status == 404:
            return Absent(
                f"{constants.ENDPOINT} has no {self._path(name)} of {self.name}: the repository, its revision or this"
                " file is not there (the server does not say which)."
            )
        if status in (401, 403):
            return SourceNotFound(f"The hub refuses access to {self.name} ({status}). {LOG_IN}")
        return SourceNotFound(f"The hub answered {status} for {name} of {self.name}. Try again later.")

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name


LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or pass token=; the token needs read access."


def _module_configs(directory: Path) -> list[str]:
    """The configs of sentence-transformers' modules, wherever modules.json says that they are."""
    path = directory / "modules.json"
    modules = read_json(path, list) if path.is_file() else []
    places = [module.get("path") for module in modules if isinstance(module, dict)]
    return [f"{place}/config.json" for place in places if isinstance(place, str) and re.fullmatch(r"\w[\w.-]*", place)]


def get_broken_connection() -> tuple[type[Exception], ...]:
    """What the HTTP library beneath huggingface_hub (httpx, from its version 2 on httpx2) raises for a connection."""
    import huggingface_hub as hub

    library = importlib.import_module(type(hub.get_session()).__module__.partition(".")[0])
    return (library.RequestError,)


def import_hub() -> None:
    """Raises an ImportError with the pip line when huggingface_hub is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ImportError("A hub id needs huggingface_hub: pip install 'eqx_transformers[hub]'") from error
