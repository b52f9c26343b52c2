"""adapter_config.json: what is read of it, what is refused, and how it is written."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MalformedCheckpoint, SourceNotFound, UnsupportedConfig
from ..files import read_json
from .targets import Names

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first is written

# Options that say where an adapter came from, how it began, or how it is run, but not what it computes.
IRRELEVANT = {
    "corda_config",
    "ensure_weight_tying",  # whether tied ends have the same numbers is looked at
    "eva_config",
    "init_ia3_weights",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Ways to begin that leave the base as it is. The others change it, and PEFT changes it again when it loads.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Settings:
    """An adapter's configuration, in the words of the PEFT library's own, for what it computes.

    `targets` None: whichever layers the file has factors for. `tokens` are rows of a table by the end of its module's
    name, or of the token table, as a tuple.
    """

    kind: str
    base: str | None = None
    model_class: str | None = None
    rank: int = 8
    alpha: int | float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    targets: Names | None = None
    exclude: Names | None = None
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    feedforward: Names = ()
    saved: tuple[str, ...] = ()
    tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None


def read(directory: Path) -> Settings:
    """The settings of a directory's adapter.

    Raises a `SourceNotFound`, a `MalformedCheckpoint` for a field of another kind than it should be, and an
    `UnsupportedConfig` that names the option for what is not had here.
    """
    path = directory / CONFIG
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:5]) if directory.is_dir() else "no directory"
        hint = " Pass the directory that the file is in." if directory.is_file() else ""
        raise SourceNotFound(
            f"{path} is not there (found: {found or 'nothing'}): not a directory of a PEFT adapter.{hint} (An adapter"
            " on the hub is fetched first, by huggingface_hub.snapshot_download.)"
        )
    fields = read_json(path)
    kind = fields.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UnsupportedConfig(f"{path}: peft_type = {kind!r}; LORA and IA3 are read. Merge it with PEFT instead.")
    _expect_known(path, fields)
    return Settings(kind, **{ours: _checked(path, name, fields, kind_) for name, (ours, kind_) in READ.items()})


def _expect_known(path: Path, fields: Mapping[str, Any]) -> None:
    known = READ.keys() | IRRELEVANT | {"peft_type", "fan_in_fan_out", "init_lora_weights"}
    if strange := {name: value for name, value in fields.items() if name not in known and value not in OFF}:
        said = ", ".join(f"{name} = {str(value)[:60]!r}" for name, value in sorted(strange.items()))
        raise UnsupportedConfig(f"{path} asks for {said}, which is not had here. Merge the adapter with PEFT instead.")
    if (init := fields.get("init_lora_weights", True)) not in INITS:
        raise UnsupportedConfig(
            f"{path}: init_lora_weights = {init!r}. Such an adapter belongs to a base that its initialisation changed,"
            " and not to the one that this was loaded from. Save it with PEFT as a plain one, by"
            " save_pretrained(…, path_initial_model_for_weight_conversion=…), or with the changed base and True here."
        )


OFF = (None, False, "", [], {}, 0)


def _checked(path: Path, name: str, fields: Mapping[str, Any], kind: "Kind") -> Any:
    value = fields.get(name)
    try:
        return kind.read(kind.default if value is None else value)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise MalformedCheckpoint(f"{path}: {name} = {str(value)[:60]!r}; expected {kind.said}.") from error


@dataclass(frozen=True)
class Kind:
    """What a field may hold: how it is said, what it is when it is not stated, and how it is read."""

    said: str
    default: Any
    read: Callable[[Any], Any]


def _is(value: Any, *types: type) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError
    return value


def _names(value: Any) -> Names:
    """Every name is a part of a regular expression somewhere, so that it must be one itself."""
    return _pattern(value) if isinstance(value, str) else tuple(map(_pattern, _is(value, list, tuple)))


def _pattern(value: Any) -> str:
    return re.compile(_is(value, str)).pattern


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_is(i, int) for i in (value if isinstance(value, list) else [value]))


def _counts(value: Any) -> int:
    if _is(value, int) < 1:
        raise ValueError
    return value


def _one_of(*names: str) -> Callable[[Any], str]:
    return lambda value: names[names.index(value)]


def _tokens(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    return {k: _numbers(v) for k, v in value.items()} if isinstance(value, dict) else _numbers(value)


def _maybe(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _flag(value: Any) -> bool:
    return _is(value, bool)


def _number(value: Any) -> int | float:
    return _is(value, int, float)


def _dictionary(read: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {_pattern(k): read(v) for k, v in _is(value, dict).items()}


TARGETS = Kind("a regular expression or a list of names", None, _maybe(_names))
# The fields that are read: their word, ours, and what they hold.
READ: dict[str, tuple[str, Kind]] = {
    "auto_mapping": ("model_class", Kind("an object", {}, lambda x: _is(x, dict).get("base_model_class"))),
    "base_model_name_or_path": ("base", Kind("a name", None, _maybe(lambda x: _is(x, str)))),
    "r": ("rank", Kind("a whole number above 0", 8, _counts)),
    "lora_alpha": ("alpha", Kind("a number", 8, _number)),
    "rank_pattern": ("rank_pattern", Kind("ranks by pattern", {}, _dictionary(_counts))),
    "alpha_pattern": ("alpha_pattern", Kind("numbers by pattern", {}, _dictionary(_number))),
    "lora_dropout": ("dropout", Kind("a number", 0.0, lambda x: float(_number(x)))),
    "use_rslora": ("rslora", Kind("true or false", False, _flag)),
    "use_dora": ("dora", Kind("true or false", False, _flag)),
    "lora_bias": ("lora_bias", Kind("true or false", False, _flag)),
    "bias": ("bias", Kind("none, all or lora_only", "none", _one_of("none", "all", "lora_only"))),
    "target_modules": ("targets", TARGETS),
    "exclude_modules": ("exclude", TARGETS),
    "layers_to_transform": ("layers", Kind("a number or a list of numbers", None, _maybe(_numbers))),
    "layers_pattern": ("layers_pattern", Kind("a name or a list of names", (), lambda x: _tuple(_names(x)))),
    "feedforward_modules": ("feedforward", Kind("a regular expression or a list of names", (), _names)),
    "modules_to_save": ("saved", Kind("a list of names", (), lambda x: _tuple(_names(x)))),
    "trainable_token_indices": ("tokens", Kind("numbers, or lists of numbers by name", None, _maybe(_tokens))),
}


def _tuple(names: Names) -> tuple[str, ...]:
    return () if not names else (names,) if isinstance(names, str) else names


def as_json(settings: Settings, *, turned: bool) -> dict[str, Any]:
    """What PEFT reads as these settings. `turned`: the layers' matrices are stored as (inputs, outputs)."""
    common = {
        "peft_type": settings.kind,
        "base_model_name_or_path": settings.base,
        "inference_mode": True,
        "target_modules": list(settings.targets or ()),
        "modules_to_save": list(settings.saved) or None,
        "fan_in_fan_out": turned,
    }
    if settings.kind == "IA3":
        return common | {"feedforward_modules": list(settings.feedforward), "init_ia3_weights": True}
    own = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "rank_pattern": {re.escape(name): rank for name, rank in settings.rank_pattern.items()},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in settings.alpha_pattern.items()},
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "lora_bias": settings.lora_bias,
        "bias": settings.bias,
        "init_lora_weights": True,
    }
    return common | own
