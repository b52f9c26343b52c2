"""Checkpoints and requests that are wrong, one a row: how, the exception, and what its message says."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import ml_dtypes
import numpy as np

from converters import (
    ConversionError,
    MalformedCheckpoint as Malformed,
    Mismatch,
    SourceNotFound,
    UnsafeCheckpoint as Unsafe,
    UnsupportedConfig as Unsupported,
)
from eqx_transformers import Encoder, SequenceClassifier

from .breaking import (
    INDEX,
    KEY,
    WEIGHTS,
    another_shard,
    as_dtype,
    config,
    cut,
    empty,
    header,
    in_two_shards,
    index,
    modules,
    native,
    only,
    pooling,
    remove,
    tensors,
    text,
    to,
    trail,
    twice,
)


@dataclass(frozen=True)
class Case:
    """`make` changes the directory (or returns another path to load); `says` is in the message, piece by piece.

    `options` are those of `load`: a case with some is not tried on the command line, unless `argv` says how.
    """

    name: str
    make: Callable[[Path], Any]
    error: type[ConversionError]
    says: str
    options: dict[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return self.says.split(" … ")


DEEP = "[" * 100_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 498818054\n"
PAGE = b"<!DOCTYPE html><html><body>404: not found</body></html>"
SUPPORTED = "supported are … bert: BertModel, BertForMaskedLM … roberta: RobertaModel … xlm-roberta: XLMRobertaModel"

# fmt: off
PLACES = [
    Case("a directory that is not there", lambda d: d / "x/y/z", SourceNotFound, "x/y/z … no directory … hub id"),
    Case("a file instead of a directory", lambda d: d / "config.json", SourceNotFound,
         "config.json is a file … directory"),
    Case("an empty directory", empty, Malformed, "has no config.json … it is empty"),
    Case("no config.json", remove("config.json"), Malformed, f"has no config.json … it holds {WEIGHTS}"),
    Case("no such subfolder", lambda d: None, SourceNotFound, "no directory 'sub'", options={"subfolder": "sub"}),
]

CONFIGS = [
    Case("config.json is not JSON", text("config.json", "{"), Malformed,
         "config.json is not JSON … line 1 … Fetch it again"),
    Case("config.json is empty", text("config.json", ""), Malformed, "config.json is not JSON … It is empty"),
    Case("config.json is a web page", text("config.json", PAGE), Malformed, "config.json is not JSON … web page"),
    Case("config.json is a Git LFS pointer", text("config.json", POINTER), Malformed, "config.json … git lfs pull"),
    Case("config.json is not text", text("config.json", b"\xff\xfe\x00"), Malformed, "config.json is not JSON"),
    Case("config.json is a list", text("config.json", "[1]"), Malformed,
         "config.json holds a list … expected an object"),
    Case("config.json is null", text("config.json", "null"), Malformed,
         "config.json holds null … expected an object"),
    Case("config.json names a field twice", text("config.json", '{"vocab_size": 61, "vocab_size": 62}'), Malformed,
         "config.json is not JSON … names 'vocab_size' twice"),
    Case("config.json has a number of a million digits", text("config.json", '{"vocab_size": 1' + "0" * 10**6 + "}"),
         Malformed, "config.json is not JSON … digits"),
    Case("config.json is nested deeply", text("config.json", DEEP), Malformed, "config.json is nested too deeply"),
    Case("an unknown architecture", config(architectures=["RobertaForSorcery"]), Unsupported,
         f"RobertaForSorcery is not supported … {SUPPORTED} … head="),
    Case("an unknown model_type", config(model_type="mamba"), Unsupported, f"model_type 'mamba' … {SUPPORTED}"),
    Case("a model_type that is no text", config(model_type=["roberta"]), Unsupported,
         f"model_type ['roberta'] … {SUPPORTED}"),
    Case("no model_type, no architectures", config(model_type=..., architectures=...), Unsupported,
         f"no model_type … {SUPPORTED}"),
    Case("architectures is null", config(architectures=None), Unsupported,
         f"an architecture that config.json does not name … {SUPPORTED} … head="),
    Case("an unknown fact", config(rope_theta=10000.0), Unsupported,
         "rope_theta = 10000.0 is unknown … strict=False"),
    Case("several unknown facts", config(rope_theta=1, alibi=True), Unsupported, "rope_theta = 1 … alibi = True"),
    Case("a quantized checkpoint", config(quantization_config={"bits": 4}), Unsupported,
         "quantization_config = {'bits': 4}"),
    Case("a size that is text", config(hidden_size="21"), Unsupported,
         "hidden_size = '21' … expected a whole number"),
    Case("a size that is a fraction", config(vocab_size=61.5), Unsupported,
         "vocab_size = 61.5 … expected a whole number"),
    Case("a size that is a flag", config(vocab_size=True), Unsupported,
         "vocab_size = True … expected a whole number"),
    Case("a size beyond all memory", config(vocab_size=10**30), Unsupported,
         "vocab_size = 1000 … expected a whole number"),
    Case("a size that is zero", config(num_attention_heads=0), Unsupported, "num_heads = 0 … at least 1"),
    Case("a size that is negative", config(num_hidden_layers=-1), Unsupported, "num_layers = -1 … not be negative"),
    Case("a number that is none", config(layer_norm_eps=float("nan")), Unsupported,
         "layer_norm_eps = nan … expected a number"),
    Case("a number that is negative", config(layer_norm_eps=-1e-5), Unsupported,
         "layer_norm_eps = -1e-05 … 0 or more"),
    Case("a rate above one", config(hidden_dropout_prob=3), Unsupported, "hidden_dropout_prob = 3 … from 0 to 1"),
    Case("a flag that is text", config(tie_word_embeddings="yes"), Unsupported,
         "tie_word_embeddings = 'yes' … true or false"),
    Case("labels that are a list", config(id2label=["a"]), Unsupported, "id2label = ['a'] … expected a dictionary"),
    Case("labels without numbers", config(id2label={"a": "b"}), Unsupported,
         "id2label = {'a': 'b'} … whole numbers"),
    Case("an unknown activation", config(hidden_act="snake"), Unsupported,
         "hidden_act = 'snake' … expected one of … gelu_new"),
    Case("cross-attention", config(add_cross_attention=True), Unsupported,
         "add_cross_attention = True is not supported … only False"),
    Case("relative positions", config(position_embedding_type="relative_key"), Unsupported,
         "position_embedding_type = 'relative_key' is not supported … only 'absolute'"),
    Case("heads that do not divide", config(num_attention_heads=4), Unsupported,
         "embed_dim = 21 is not a multiple … num_heads = 4"),
    Case("a padding token that is none", config(pad_token_id=99), Unsupported, "padding_id = 99 … 61 rows"),
    Case("a billion layers", config(num_hidden_layers=10**9), Unsupported, "1000000000 layers … 42 tensors"),
]

CONTAINERS = [
    Case("a container that is not read", only("tf_model.h5"), Malformed,
         "has no weights … only tf_model.h5, a container that is not read … save_pretrained"),
    Case("many pickles of other names",
         lambda d: [remove(WEIGHTS)(d), *(text(f"p-{i}.bin", "")(d) for i in range(9))], Malformed,
         "has no weights … There is p-0.bin, p-1.bin, p-2.bin, …: rename it"),
    Case("no weights", remove(WEIGHTS), Malformed,
         f"has no weights … {WEIGHTS}, {INDEX}, pytorch_model.bin … flax_model.msgpack … download complete"),
    Case("weights of another name", lambda d: (d / WEIGHTS).rename(d / "roberta.safetensors") and None, Malformed,
         "has no weights … There is roberta.safetensors: rename it"),
    Case("a truncated file", cut, Malformed, f"{WEIGHTS} … not fully covered … stopped early … Fetch it again"),
    Case("a file cut within its header", lambda d: text(WEIGHTS, (d / WEIGHTS).read_bytes()[:200])(d), Malformed,
         f"{WEIGHTS} … It has 200 bytes … stopped early"),
    Case("a file of no bytes", text(WEIGHTS, b""), Malformed, f"{WEIGHTS} … It has 0 bytes … stopped early"),
    Case("weights that are a Git LFS pointer", text(WEIGHTS, POINTER), Malformed,
         f"{WEIGHTS} … Git LFS pointer … git lfs pull"),
    Case("weights that are a web page", text(WEIGHTS, PAGE), Malformed, f"{WEIGHTS} … web page … Download it again"),
    Case("a renamed archive of pickles", text(WEIGHTS, b"PK\x03\x04" + bytes(60)), Malformed,
         f"{WEIGHTS} … pickle of torch"),
    Case("a renamed pickle", text(WEIGHTS, b"\x80\x02}q\x00." + bytes(60)), Malformed,
         f"{WEIGHTS} … pickle of torch"),
    Case("a key named twice", header(twice), Malformed, f"{KEY} … twice"),
    Case("trailing bytes", trail, Malformed, f"{WEIGHTS} … not fully covered"),
    Case("a dtype of no tensor", header(lambda h: h.replace(b'"F32"', b'"F33"', 1)), Malformed,
         f"{WEIGHTS} … F33 … expected one of"),
    Case("a header that is a list", text(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), Malformed,
         f"{WEIGHTS} … sequence"),
    Case("no tensors", text(WEIGHTS, (2).to_bytes(8, "little") + b"{}"), Malformed, f"{WEIGHTS} … holds no tensors"),
]

SHARDS = [
    Case("a shard above the directory", to("../x.safetensors"), Unsafe,
         f"{INDEX} … {KEY} … '../x.safetensors' … beside it"),
    Case("a shard at an absolute path", to("/etc/model.safetensors"), Unsafe,
         f"{INDEX} … '/etc/model.safetensors' … beside it"),
    Case("a shard in a directory", to("a/b.safetensors"), Unsafe, f"{INDEX} … 'a/b.safetensors' … beside it"),
    Case("a shard of another container", to("model.bin"), Unsafe, f"{INDEX} … 'model.bin' … .safetensors"),
    Case("a shard that is a number", to(7), Unsafe, f"{INDEX} … to 7 … must be the name"),
    Case("a shard that is the directory above", to("..\\model.safetensors"), Unsafe, f"{INDEX} … must be the name"),
    Case("a shard of no name", to(""), Unsafe, f"{INDEX} … to '' … must be the name"),
    Case("a shard with a NUL in its name", to("a\0.safetensors"), Unsafe, f"{INDEX} … must be the name"),
    Case("a shard that is a directory", lambda d: [to("x.safetensors")(d), (d / "x.safetensors").mkdir()], Malformed,
         "x.safetensors is missing … download complete"),
    Case("a shard that links to nothing",
         lambda d: [to("x.safetensors")(d), (d / "x.safetensors").symlink_to(d / "y")], Malformed,
         "x.safetensors is missing … download complete"),
    Case("a shard that links to itself",
         lambda d: [to("x.safetensors")(d), (d / "x.safetensors").symlink_to("x.safetensors")], Malformed,
         "x.safetensors is missing … download complete"),
    Case("a wrong total", index(lambda held, d: held["metadata"].update(total_size=7)), Malformed,
         f"{INDEX} … total_size of 7 bytes … tensors have … another version"),
    Case("a total that is text", index(lambda held, d: held["metadata"].update(total_size="all")), Malformed,
         f"{INDEX} … total_size of 'all' bytes"),
    Case("a key that the index names twice", lambda d: (d / INDEX).write_text(
        (d / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"{KEY}": "a.safetensors",')) and None,
         Malformed, f"{INDEX} is not JSON … names '{KEY}' twice"),
    Case("an index beyond all sizes", lambda d: os.truncate(d / INDEX, (1 << 26) + 1), Malformed, f"{INDEX} has 67 MB"),
    Case("a shard that is missing", to("lost.safetensors"), Malformed,
         "lost.safetensors is missing … download complete"),
    Case("a shard that is truncated", lambda d: [p.write_bytes(p.read_bytes()[:-1]) for p in d.glob("model-00001*")],
         Malformed, "model-00001-of … not fully covered … Fetch it again"),
    Case("a key in another shard than stated", index(another_shard), Malformed,
         f"{INDEX} … {KEY} … says model- … but model-"),
    Case("a key in two shards", in_two_shards, Malformed, f"{KEY} … is in two files … model-0000"),
    Case("a key that no shard holds",
         index(lambda held, d: held["weight_map"].update(ghost=held["weight_map"][KEY])), Malformed,
         f"{INDEX} … holds ghost, but it does not"),
    Case("a key that the index does not list", index(lambda held, d: held["weight_map"].pop(KEY) and None),
         Malformed, f"holds {KEY}, which {INDEX} does not list"),
    Case("an index without weight_map", index(lambda held, d: held.pop("weight_map") and None), Malformed,
         f"{INDEX} … no weight_map"),
    Case("an empty weight_map", index(lambda held, d: held.update(weight_map={})), Malformed,
         f"{INDEX} … no weight_map"),
    Case("a weight_map that is a list", index(lambda held, d: held.update(weight_map=[KEY])), Malformed,
         f"{INDEX} … no weight_map"),
    Case("an index that is a list", index(lambda held, d: [held]), Malformed,
         f"{INDEX} … holds a list … expected an object"),
    Case("an index that is not JSON", text(INDEX, "{"), Malformed, f"{INDEX} … is not JSON"),
]

SENTENCES = [
    Case("an unknown module", modules("Transformer", "Pooling", "Dense"), Unsupported,
         "modules.json lists Transformer, Pooling, Dense … supported is Transformer, Pooling … head=Encoder"),
    Case("no modules", text("modules.json", "[]"), Unsupported, "modules.json lists nothing … supported is"),
    Case("modules.json is not JSON", text("modules.json", "["), Malformed, "modules.json is not JSON"),
    Case("modules.json is an object", text("modules.json", "{}"), Malformed,
         "modules.json holds an object … expected a list"),
    Case("modules without types", text("modules.json", "[1]"), Malformed, "modules.json is not a list of modules"),
    Case("a module elsewhere", modules("Transformer", "Pooling", path="../1_Pooling"), Unsafe,
         "modules.json … '../1_Pooling'"),
    Case("a module without a path", modules("Transformer", "Pooling", path=None), Unsafe, "modules.json … None"),
    Case("a missing pooling", modules("Transformer", "Pooling", path="2_Pooling"), Malformed,
         "2_Pooling/config.json cannot be read"),
    Case("an unknown pooling", pooling(pooling_mode_max_tokens=True), Unsupported,
         "asks for the pooling pooling_mode_max_tokens … supported: mean, cls"),
    Case("two poolings", pooling(pooling_mode_mean_tokens=True, pooling_mode_cls_token=True), Unsupported,
         "pooling_mode_mean_tokens, pooling_mode_cls_token … supported: mean, cls"),
    Case("no pooling", pooling(), Unsupported, "asks for the pooling none … supported: mean, cls"),
    Case("a pooling that is a number", pooling(pooling_mode=7), Unsupported, "asks for the pooling 7"),
    Case("a pooling that is a list", text("1_Pooling/config.json", "[]"), Malformed,
         "1_Pooling/config.json holds a list"),
]

TENSORS = [
    Case("float64 as it is", as_dtype(np.float64), ConversionError,
         f"{KEY} … float64 … narrow to float32 … --dtype float32"),
    Case("float8", as_dtype(ml_dtypes.float8_e4m3fn), Malformed,
         f"{KEY} is F8_E4M3 … expected F32, F16, BF16 … quantized"),
    Case("float8 in another dtype", as_dtype(ml_dtypes.float8_e4m3fn), Malformed, f"{KEY} is F8_E4M3",
         options={"dtype": "float32"}, argv=("--dtype", "float32")),
    Case("whole numbers", as_dtype(np.int8), Malformed, f"{KEY} is I8 … expected F32, F16, BF16 … quantized"),
    Case("long whole numbers", as_dtype(np.int64), Malformed, f"{KEY} is I64 … expected F32"),
    Case("flags", as_dtype(np.bool_), Malformed, f"{KEY} is BOOL … expected F32"),
    Case("a missing key", tensors(lambda held: held.pop(KEY)), Mismatch,
         f"missing        1 … {KEY}, needed by head.dense.weight"),
    Case("an extra key", tensors(lambda held: held.__setitem__("lm_head.dense.wieght", held["lm_head.bias"])),
         Mismatch, "unexpected     1 … lm_head.dense.wieght"),
    Case("a misspelled key", tensors(lambda held: held.__setitem__("lm_head.dense.wieght", held.pop(KEY))), Mismatch,
         f"missing        1 … unexpected     1 … lm_head.dense.wieght (nearest known: {KEY})"),
    Case("a resized key", tensors(lambda held: held.__setitem__(KEY, held[KEY][:20].copy())), Mismatch,
         f"mismatched     1 … {KEY}: expected [21, 21], found [20, 21]"),
    Case("a second name with other numbers",
         tensors(lambda held: held.__setitem__("lm_head.decoder.bias", held["lm_head.bias"] + 1)), Malformed,
         "lm_head.decoder.bias and lm_head.bias … different numbers"),
]

REQUESTS = [
    Case("a head of another library", lambda d: None, ConversionError,
         "head=MLP is not a model of roberta … Encoder, MaskedLM", options={"head": eqx.nn.MLP}),
    Case("an unknown override", lambda d: None, ConversionError,
         "hidden_size is not a fact … its facts are … embed_dim", options={"override": {"hidden_size": 7}}),
    Case("an override of another type", lambda d: None, ConversionError, "override: dropout = '0.1', expected float",
         options={"override": {"dropout": "0.1"}}),
    Case("an override of another word", lambda d: None, ConversionError, "override: pooling = 'max' … mean … cls",
         options={"override": {"pooling": "max"}}),
    Case("an override that cannot be", lambda d: None, ConversionError, "num_heads = 5 … not a multiple",
         options={"override": {"num_heads": 5}}),
    Case("an override of an unknown activation", lambda d: None, ConversionError,
         "activation = 'snake' is not one of", options={"override": {"activation": "snake"}}),
    Case("an override of a size", lambda d: None, Mismatch, "mismatched … expected [41, 21], found [37, 21]",
         options={"override": {"mlp_dim": 41}}),
    Case("no labels", lambda d: None, ConversionError, "labels = 0 … at least 1",
         options={"labels": 0, "head": SequenceClassifier}),
    Case("an empty list of labels", lambda d: None, ConversionError, "labels = [] … at least 1",
         options={"labels": [], "head": SequenceClassifier}),
    Case("labels that are one text", lambda d: None, ConversionError, "labels = 'good bad' … list of their names",
         options={"labels": "good bad", "head": SequenceClassifier}),
    Case("labels of one name", lambda d: None, ConversionError, "labels = ['a', 'a'] … one name",
         options={"labels": ["a", "a"], "head": SequenceClassifier}),
    Case("labels of a model without", lambda d: None, ConversionError,
         "labels=2 is for a classifier … MaskedLM … head=", options={"labels": 2}, argv=("--labels", "2")),
    Case("new arrays without a key", lambda d: None, ConversionError,
         "head.dense.weight … not in the file … key=jax.random.key", options={"head": SequenceClassifier}),
    Case("allowed to be missing without a key", tensors(lambda held: held.pop(KEY)), ConversionError,
         "head.dense.weight: not in the file … key=jax.random.key", options={"allow_missing": ["head.*"]}),
    Case("an unknown dtype to cast to", lambda d: None, ConversionError,
         "dtype = 'float31' … auto, float32, bfloat16, float16", options={"dtype": "float31"}),
]

NATIVE = [
    Case("native without weights", native(remove(WEIGHTS)), Malformed, f"{WEIGHTS} … missing"),
    Case("native with a truncated file", native(cut), Malformed, f"{WEIGHTS} … not fully covered"),
    Case("native with a missing array", native(tensors(lambda held: held.pop("head.bias"))), Malformed,
         "missing: head.bias"),
    Case("native of a later version", native(config(version=99)), Malformed, "version 99 … reads 1"),
    Case("native without its origin", native(remove("origin.json")), ConversionError,
         "not made by a converter … eqx_transformers.load"),
    Case("native with another origin", native(text("origin.json", "{}")), Malformed, "origin.json does not say"),
    Case("native with options", native(lambda d: None), ConversionError, "native format … head, labels, override",
         options={"head": Encoder}, argv=("--head", "Encoder")),
]
# fmt: on

CASES = [*PLACES, *CONFIGS, *CONTAINERS, *SHARDS, *SENTENCES, *TENSORS, *REQUESTS, *NATIVE]
ON_THE_COMMAND_LINE = [case for case in CASES if not case.options or case.argv]
