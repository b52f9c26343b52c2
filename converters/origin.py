"""Where a model came from: what the way back needs and the model does not, as JSON."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Origin:
    """The provenance of a converted model.

    - `source`, `revision`: as given to `load`; `directory`: where the files were read
    - `family`, `architecture`: as the reference library calls them
    - `config`: config.json as it was, label names included
    - `layout`: the weight files and the keys in each, in order; `dtypes`: of each key; `metadata` of the files
    - `tied`, `renamed`, `ignored`, `dropped`: as in the report
    - `files`: the companions (tokenizer, sentence-transformers) beside the weights
    """

    source: str
    family: str
    architecture: str
    config: dict[str, Any]
    revision: str | None = None
    directory: str | None = None
    layout: dict[str, list[str]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str] | None:
        """The names of a classifier's labels, where config.json has them."""
        names = self.config.get("id2label")
        return [names[i] for i in sorted(names, key=int)] if names else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Origin":
        """The inverse of `as_json`; fields of later versions are left out. Raises a `TypeError` for other types."""
        given = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        for name, x in given.items():
            kind = KINDS.get(name, dict)
            if not (isinstance(x, kind) or (x is None and name in ("revision", "directory"))):
                raise TypeError(f"its {name} is {type(x).__name__}")
        if not all(isinstance(name, str) for name in given.get("files", ())):
            raise TypeError("its files are not names")
        return cls(**given)


KINDS = dict.fromkeys(("source", "family", "architecture", "revision", "directory"), str) | {"files": list}
