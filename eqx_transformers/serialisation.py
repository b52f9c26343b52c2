"""The native format: a directory that holds a model by the names of its own tree.

- `config.json`: format and version, the model's class, its facts, which of its stacks are stacked
- `model.safetensors`: every array by its tree path (key and value, never by position), in its own dtype
- `extras.json` and files: what was handed along (the origin of converted weights, a tokenizer)
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from . import tensor_file
from ._files import replacing
from ._settings import gaps, settings
from .models.backbones import BACKBONES, ENCODERS
from .models.heads import HEADS
from .models.t5 import T5
from .models.t5_config import T5Config
from .models.t5_vae import T5VAE
from .models.t5_vae_config import T5VAEConfig
from .skeletons import differences, skeleton, stacked_paths
from .surgery.paths import is_array_like, leaves_by_path, spell

FORMAT, VERSION = "eqx_transformers", 1
MODELS: dict[str, type] = {one.__name__: one for one in (*BACKBONES.values(), *ENCODERS.values(), T5, T5VAE)} | HEADS
OWN = ("config.json", "model.safetensors", "extras.json", "origin.json")
CONFIGS = {one.__name__: one for one in (*BACKBONES, T5VAEConfig)}
INNER = {"t5": T5Config}  # facts that are facts themselves


class FormatError(ValueError):
    """A directory is not in the native format, or not whole."""


def save(
    model: Any, directory: str | os.PathLike[str], *, extras: Mapping[str, Any] | None = None, edited: bool = False
) -> None:
    """Writes `model` to `directory`, which then holds all of it or is as it was before.

    `extras` travel along: a `pathlib.Path` is a file to copy under that name, anything else must be JSON.
    A model that its config does not rebuild (adapted, quantized, resized, another activation) is refused with a
    `ValueError` that names every difference, unless `edited=True`: such a directory is loaded with `skeleton=`, a
    function that repeats the edits. What it holds beside arrays (classes, static fields, functions by name) is written
    too, so that an edit which was not repeated is found.
    """
    if type(model).__name__ not in MODELS or type(model) is not MODELS[type(model).__name__]:
        raise TypeError(f"A {type(model).__name__} could not be loaded again; this library saves {', '.join(MODELS)}.")
    if not edited and (found := differences(model)):
        raise ValueError(_EDITED.format(edits="\n  ".join(found)))
    arrays = {path: leaf for path, leaf in leaves_by_path(model).items() if is_array_like(leaf)}
    specs = {path: jax.ShapeDtypeStruct(x.shape, _dtype(path, x)) for path, x in arrays.items()}
    stale = ("*.safetensors", "extras.json", "origin.json")
    with replacing(directory, stale=stale, replaceable=is_native) as fresh:
        _dump(fresh / "config.json", _describe(model, edited))
        _pack(fresh, extras or {})
        tensor_file.write(fresh / "model.safetensors", specs, lambda path: np.asarray(arrays[path]), {"format": FORMAT})


def load(
    directory: str | os.PathLike[str], *, skeleton: Callable[[Any], Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """(model, extras) of a directory that `save` wrote, bit for bit and in the dtypes that were saved.

    `skeleton` is a function of the plain model that repeats the edits of one saved with `edited=True`; it runs under
    `filter_eval_shape`, so that it costs no memory:

        load("adapted", skeleton=lambda model: add_adapter(model, where, rank=8, key=jax.random.key(0)))

    Raises a `FormatError` that names every array that is missing, unexpected or of another shape, and every setting in
    which the skeleton is another model than the one that was saved.
    """
    directory = Path(directory)
    described = _described(directory)
    if described["edited"] and skeleton is None:
        raise FormatError(f"{directory} holds an edited {described['class']}; repeat the edits in load(…, skeleton=…).")
    plain = _plain(described)
    tree = plain if skeleton is None else eqx.filter_eval_shape(skeleton, plain)
    return _filled(tree, directory / "model.safetensors", described.get("settings")), _unpack(directory)


def _expect_settings(saved: dict[str, str] | None, tree: Any, directory: Path) -> None:
    """An edit of no array (another activation, an epsilon, an adapter's dropout) must have been repeated too."""
    if saved is not None and (found := gaps(saved, settings(tree))):
        more = f"\n  … and {len(found) - 20} more" if len(found) > 20 else ""
        raise FormatError(
            f"{directory} holds another model than the one that skeleton= builds:\n  " + "\n  ".join(found[:20]) + more
        )


def is_native(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is in the native format."""
    try:
        return json.loads((Path(directory) / "config.json").read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _describe(model: Any, edited: bool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "class": type(model).__name__,
        "config": type(model.config).__name__,
        "facts": dataclasses.asdict(model.config),
        "stacked": list(stacked_paths(model)),
        "edited": edited,
        **({"settings": settings(model)} if edited else {}),
    }


def _described(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FormatError(f"{directory} is not a directory: there is no model. Is the path right?")
    if not (directory / "config.json").is_file():
        raise FormatError(f"{directory} has no config.json: it is not a model in the native format.")
    if not is_native(directory):
        raise FormatError(
            f"{directory}/config.json is not of the native format; converters.load reads Hugging Face directories."
        )
    described = json.loads((directory / "config.json").read_bytes())
    if described.get("version") != VERSION:
        raise FormatError(f"{directory} is of version {described.get('version')}; this library reads {VERSION}.")
    if described.get("class") not in MODELS or described.get("config") not in CONFIGS:
        raise FormatError(f"{directory} holds a {described.get('class')!r}; this library knows {', '.join(MODELS)}.")
    return described


def _plain(described: dict[str, Any]) -> Any:
    config_class = CONFIGS[described["config"]]
    facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described["facts"].items()}
    known = {f.name for f in dataclasses.fields(config_class)}
    if strange := sorted(facts.keys() - known):
        raise FormatError(f"config.json states {', '.join(strange)}, which {config_class.__name__} does not have.")
    facts = {name: INNER[name](**value) if isinstance(value, dict) else value for name, value in facts.items()}
    return skeleton(MODELS[described["class"]], config_class(**facts), tuple(described["stacked"]))


def _filled(tree: Any, path: Path, saved: dict[str, str] | None) -> Any:
    try:
        specs, _ = tensor_file.read_header(path)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing: the directory is not whole.") from None
    except tensor_file.DamagedFile as error:
        raise FormatError(str(error)) from error
    wanted = {path: leaf for path, leaf in leaves_by_path(tree).items() if is_array_like(leaf)}
    if problems := _problems(wanted, specs):
        raise FormatError(f"{path} does not hold this model:\n  " + "\n  ".join(problems))
    _expect_settings(saved, tree, path.parent)
    with open(path, "rb", buffering=0) as file:
        read = lambda path, leaf: (
            jax.device_put(tensor_file.read_tensor(file, specs[spell(path)])) if is_array_like(leaf) else leaf
        )
        return jax.tree_util.tree_map_with_path(read, tree)


def _problems(wanted: dict[str, Any], specs: dict[str, tensor_file.Spec]) -> list[str]:
    return [
        *(f"missing: {path}" for path in wanted if path not in specs),
        *(f"unexpected: {path}" for path in specs if path not in wanted),
        *(
            f"{path}: the file has {specs[path].shape}, the model {tuple(leaf.shape)}"
            for path, leaf in wanted.items()
            if path in specs and specs[path].shape != tuple(leaf.shape)
        ),
        *(f"{path}: {why}" for path in wanted if path in specs and (why := _unreadable(specs[path]))),
    ]


def _unreadable(spec: tensor_file.Spec) -> str | None:
    if spec.numpy_dtype is None:
        return f"{spec.dtype} is a dtype that this library cannot hold"
    if jax.dtypes.canonicalize_dtype(spec.numpy_dtype) != spec.numpy_dtype:
        return f'saved in {spec.numpy_dtype}, which JAX would narrow: jax.config.update("jax_enable_x64", True) first'
    return None


def _pack(directory: Path, extras: Mapping[str, Any]) -> None:
    values, files = {}, []
    for name, value in extras.items():
        if isinstance(value, Path) and (name in OWN or not _inside(name)):
            raise ValueError(f"extras: {name!r} cannot name a file: it is the format's own, or outside the directory.")
        if isinstance(value, Path):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(value, directory / name)
            files.append(name)
        else:
            values[name] = value
    if "origin" in values:
        _dump(directory / "origin.json", values.pop("origin"))
    if values or files:
        _dump(directory / "extras.json", {"values": values, "files": files})


def _unpack(directory: Path) -> dict[str, Any]:
    packed = directory / "extras.json"
    held = json.loads(packed.read_bytes()) if packed.is_file() else {"values": {}, "files": []}
    origin = directory / "origin.json"
    first = {"origin": json.loads(origin.read_bytes())} if origin.is_file() else {}
    if outside := [name for name in held["files"] if not _inside(name)]:
        raise FormatError(f"{packed} names {outside[0]!r}, which is not inside the directory.")
    return first | held["values"] | {name: directory / name for name in held["files"]}


def _inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype(path: str, x: Any) -> np.dtype:
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(f"{path} is a shape without numbers: this is a skeleton, there is nothing to save.")
    if x.dtype not in tensor_file.NAMES:
        raise ValueError(f"{path} is of dtype {x.dtype}, which a safetensors file of this library cannot hold.")
    return np.dtype(x.dtype)


_EDITED = """The model differs from what its config builds, so it could not be loaded again from its config:
  {edits}
Use reconfigure(model, …) for a changed fact, merge(model) for adapters, dequantize(model) for small weights, or pass
edited=True and load with skeleton=."""
