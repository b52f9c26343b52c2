"""From a hub id to a local directory, through huggingface_hub and its cache."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import MalformedCheckpoint, SourceNotFound

# Small files that make a converted or exported directory useful; a repository has some of them.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Downloads what a conversion needs (or finds it in the cache) and returns its directory.

    The config comes first, then the weights, then the companions. Raises `SourceNotFound` for a repository, revision
    or network that is not there, `MalformedCheckpoint` for a repository without safetensors.
    """
    hub = _Hub(repo_id, revision, subfolder, token, local_files_only)
    directory = hub.get("config.json").parent
    paths = [hub.find(WEIGHTS)] if hub.has(WEIGHTS) else hub.shards()
    paths += [hub.find(name) for name in COMPANIONS]
    for path in paths:
        if path is not None and directory not in path.parents:
            raise SourceNotFound(f"{repo_id} changed while it was being downloaded. Run again, or pin revision=.")
    return directory


class _Hub:
    def __init__(self, repo_id: str, revision: str | None, subfolder: str | None, token: Any, offline: bool):
        self.repo_id, self.revision, self.subfolder, self.token, self.offline = (
            repo_id,
            revision,
            subfolder,
            token,
            offline,
        )

    def get(self, name: str) -> Path:
        """A file that must be there."""
        import_hub()
        import huggingface_hub as hub

        with self._explained():
            return Path(
                hub.hf_hub_download(
                    self.repo_id,
                    name,
                    subfolder=self.subfolder,
                    revision=self.revision,
                    token=self.token,
                    local_files_only=self.offline,
                )
            )

    def find(self, name: str) -> Path | None:
        """A file that may be there."""
        try:
            return self.get(name)
        except _Absent:
            return None

    def has(self, name: str) -> bool:
        return self.find(name) is not None

    def shards(self) -> list[Path | None]:
        index = self.find(INDEX)
        if index is None:
            return self._only_others()
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MalformedCheckpoint(f"{self.repo_id}: {INDEX} is not an index ({error}).") from error
        if outside := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
            raise MalformedCheckpoint(f"{self.repo_id}: {INDEX} names {outside[0]!r}, which is not a file beside it.")
        return [index, *(self.get(name) for name in names)]

    def _only_others(self) -> list[Path | None]:
        other = next(
            (n for n in ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack") if self._exists(n)),
            None,
        )
        what = f"it has {other}, which is not read yet" if other else "it has no weights under a known name"
        raise MalformedCheckpoint(
            f"{self.repo_id} has no {WEIGHTS}; {what}. Look for a revision with safetensors, or save it as safetensors"
            " with transformers: AutoModel.from_pretrained(…).save_pretrained(…)."
        )

    def _exists(self, name: str) -> bool:
        import huggingface_hub as hub

        name = f"{self.subfolder}/{name}" if self.subfolder else name
        try:
            hub.get_hf_file_metadata(hub.hf_hub_url(self.repo_id, name, revision=self.revision), token=self.token)
        except (hub.errors.HfHubHTTPError, OSError, ValueError):
            return False
        return True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        from huggingface_hub import errors

        at = f" at revision {self.revision}" if self.revision else ""
        try:
            yield
        except errors.RevisionNotFoundError as error:
            raise SourceNotFound(f"{self.repo_id} has no revision {self.revision!r}.") from error
        except errors.GatedRepoError as error:
            raise SourceNotFound(f"{self.repo_id} is gated: accept its terms on the hub and pass token=.") from error
        except errors.RepositoryNotFoundError as error:
            raise SourceNotFound(
                f"The hub has no repository {self.repo_id!r}{at}, or it is private (then pass token=), and there is no"
                f" local directory of that name."
            ) from error
        except errors.LocalEntryNotFoundError as error:
            raise SourceNotFound(
                f"The hub cannot be reached (or is switched off), and {self.repo_id}{at} is not in the local cache."
                " Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or download it once while online."
            ) from error
        except errors.EntryNotFoundError as error:
            raise _Absent(f"{self.repo_id}{at} has no config.json: it is not a transformers model.") from error
        except errors.HFValidationError as error:
            raise SourceNotFound(f"{self.repo_id!r} is neither a directory here nor a hub id ({error}).") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status == 404:
                raise _Absent(f"The hub has no {self.repo_id!r}{at}, or it has no config.json.") from error
            raise SourceNotFound(f"The hub answered {status} for {self.repo_id}{at}: {error}") from error


class _Absent(SourceNotFound):
    """The repository does not have this file (or, for a server that does not tell these apart, does not exist)."""


def import_hub() -> None:
    """Raises an ImportError with the pip line when huggingface_hub is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ImportError("A hub id needs huggingface_hub: pip install 'eqx_transformers[hub]'") from error
