"""Ways to break a directory that holds a whole checkpoint: each gives a function of the directory."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

import converters
from eqx_transformers import save

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY = "lm_head.dense.weight"


def config(**changes):
    """Changes fields of config.json; `...` removes one."""

    def change(directory):
        path = directory / "config.json"
        fields = json.loads(path.read_bytes()) | changes
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))

    return change


def text(name, content):
    return lambda directory: (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(change):
    def edit(directory):
        held = load_file(directory / WEIGHTS)
        change(held)
        save_file(held, directory / WEIGHTS)

    return edit


def as_dtype(dtype, key=KEY):
    return tensors(lambda held: held.__setitem__(key, held[key].astype(dtype)))


def cut(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def trail(directory):
    with open(directory / WEIGHTS, "ab") as file:
        file.write(b"PK\x03\x04 an archive")


def header(change):
    """Rewrites the header's text; the data stays."""

    def edit(directory):
        whole = (directory / WEIGHTS).read_bytes()
        size = int.from_bytes(whole[:8], "little")
        new = change(whole[8 : 8 + size])
        (directory / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + whole[8 + size :])

    return edit


def twice(head):
    """A second entry of the same name and place, which the safetensors library accepts."""
    fields = json.loads(head)
    return head.rstrip()[:-1] + b"," + json.dumps({KEY: fields[KEY]}).encode()[1:]


def only(name, content=b"PK\x03\x04"):
    def edit(directory):
        (directory / WEIGHTS).unlink()
        (directory / name).write_bytes(content)

    return edit


def index(change):
    """Changes the index of a sharded checkpoint."""

    def edit(directory):
        held = json.loads((directory / INDEX).read_bytes())
        (directory / INDEX).write_text(json.dumps(change(held, directory) or held))

    return edit


def to(shard):
    return index(lambda held, directory: held["weight_map"].__setitem__(KEY, shard))


def another_shard(held, directory):
    mine = held["weight_map"][KEY]
    held["weight_map"][KEY] = next(name for name in held["weight_map"].values() if name != mine)


def in_two_shards(directory):
    weight_map = json.loads((directory / INDEX).read_bytes())["weight_map"]
    other = directory / next(name for name in weight_map.values() if name != weight_map[KEY])
    save_file(load_file(other) | {KEY: np.zeros((21, 21), np.float32)}, other)


def modules(*kinds, path="1_Pooling"):
    place = lambda i: path if i == 1 else ""
    listed = [{"idx": i, "path": place(i), "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)]
    return text("modules.json", json.dumps(listed))


def pooling(**modes):
    return text("1_Pooling/config.json", json.dumps(modes))


def native(break_it):
    """A directory in the native format, broken."""

    def edit(directory):
        model, origin = converters.load(directory)
        save(model, directory / "native", extras={"origin": origin.as_json()})
        break_it(directory / "native")
        return directory / "native"

    return edit


def remove(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def empty(directory):
    (directory / "empty").mkdir()
    return directory / "empty"
