"""What `t5_vae` begins with: the lines as tokens, the tokenizer, the model that is to be trained, and its batches."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ...models.t5 import T5
from ...models.t5_config import T5_V1, T5Config
from ...models.t5_vae import T5VAE
from ...models.t5_vae_config import FLAX_T5_VAE, T5VAEConfig
from ...serialisation import is_native, load
from ...sharding import row_share
from ..batching import Buckets
from ..data import Batches
from ..vocabularies import load_tokenizer, train_tokenizer
from ._lines import Lines, read, split, train_lines
from ._options import Settled, WrongUsage, kept_tokenizer
from ._vae_options import LATENT_TOKENS, Objective, Samples, Shape

SPECIAL = ("<pad>", "</s>", "<unk>")  # the ids that T5 gives them
Ids = Int[np.ndarray, "lines length"]
ENDS = {"padding": ("<pad>", "[PAD]"), "end": ("</s>", "[SEP]", "<eos>", "<|endoftext|>")}


@dataclass(frozen=True)
class Work:
    """What is trained on: lines as tokens, and what made them so."""

    lines: Lines
    tokenizer: Any
    padding_id: int
    end_id: int
    is_python: bool

    def say(self, row: Any) -> str:
        """The text of a row of tokens, up to its end."""
        ids = [int(i) for i in row]
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    def held(self) -> Ids:
        """The tokens of the held-out lines, in an order of their own: those of one file stand apart."""
        return self.lines.ids[self._order]

    @property
    def held_texts(self) -> list[str]:
        """The held-out lines, in that order."""
        return [self.lines.texts[i] for i in self._order]

    @property
    def _order(self) -> Int[np.ndarray, " held"]:
        return np.random.default_rng(0).permutation(np.flatnonzero(self.lines.held))


def loaded_t5(source: str | os.PathLike[str]) -> tuple[T5, Path]:
    """(a T5 in float32 with what its codes need, where its tokenizer lies). Raises a `WrongUsage` for another model."""
    import converters

    if Path(source).is_dir() and is_native(source):
        model, directory = load(source)[0], Path(source)
    else:
        origin: Any
        model, origin = converters.load(source, dtype="float32")
        directory = Path(origin.directory)
    if not isinstance(model, T5):
        raise WrongUsage(f"--t5 {source} is a {type(model).__name__}: a T5 with both halves and its output is needed.")
    if None in (model.config.padding_id, model.config.start_id, model.config.end_id):
        raise WrongUsage(f"--t5 {source}: its config must name pad_token_id, decoder_start_token_id and eos_token_id.")
    return model, directory


def prepared(path: str | os.PathLike[str] | None, out: Path, t5: Any, base: T5 | None, samples: Samples) -> Work:
    lines, repeated = read(path, samples.limit)
    tokenizer = _tokenizer(lines, out, samples.tokenizer or t5, samples)
    if base is None:
        padding_id, end_id = _special(tokenizer, "padding"), _special(tokenizer, "end")
    else:
        padding_id, end_id = base.config.padding_id, base.config.end_id
        if tokenizer.get_vocab_size() > base.config.vocab_size:
            raise WrongUsage(
                f"The tokenizer has {tokenizer.get_vocab_size()} tokens, more than the T5's {base.config.vocab_size}."
            )
    found = split(
        lines,
        repeated,
        tokenizer,
        length=samples.length,
        share=samples.hold_out,
        padding_id=padding_id,
        end_id=end_id,
    )
    return Work(found, tokenizer, padding_id, end_id, path is None or samples.check == "python")


def _tokenizer(lines: list[str], out: Path, given: Any, samples: Samples) -> Any:
    """The one that is given, or that of the run, or one made of the lines that are trained on."""
    if (path := kept_tokenizer(out) or given) is not None:
        try:
            tokenizer = load_tokenizer(path)
        except ValueError as error:
            raise WrongUsage(str(error)) from error
    else:
        own = train_lines(lines, samples.hold_out)
        tokenizer = train_tokenizer(own, "bpe", vocab_size=samples.vocab_size, special_tokens=SPECIAL, end=SPECIAL[1])
    return tokenizer


def _special(tokenizer: Any, what: str) -> int:
    found = [i for name in ENDS[what] if (i := tokenizer.token_to_id(name)) is not None]
    if not found:
        raise WrongUsage(f"The tokenizer has no token for {what}: one of {', '.join(ENDS[what])} is needed.")
    return found[0]


def drawn_model(base: T5 | None, work: Work, samples: Samples, shape: Shape, objective: Objective, seed: int) -> T5VAE:
    key = jax.random.fold_in(jax.random.key(seed), 1)
    if base is not None:
        return T5VAE.from_t5(base, _codes(shape, samples, objective, base.config), key=key)
    inner = replace(
        T5_V1,
        vocab_size=work.tokenizer.get_vocab_size(),
        embed_dim=shape.embed_dim,
        num_layers=shape.layers,
        num_decoder_layers=shape.decoder_layers,
        num_heads=shape.heads,
        head_dim=shape.embed_dim // shape.heads,
        mlp_dim=shape.mlp_dim,
        dropout=shape.dropout,
        padding_id=work.padding_id,
        start_id=work.padding_id,
        end_id=work.end_id,
    )
    return T5VAE(_codes(shape, samples, objective, inner), key=key)


def _codes(shape: Shape, samples: Samples, objective: Objective, t5: T5Config) -> T5VAEConfig:
    is_drawn = objective.regulariser == "kl"
    common: dict[str, Any] = {"t5": t5, "latent_dim": shape.latent_size, "max_tokens": samples.length}
    if shape.pooling == "first":
        count = shape.latent_tokens or min(LATENT_TOKENS, samples.length)
        if count > samples.length:
            raise WrongUsage(f"--latent-tokens {count} are more than a line has, --length {samples.length}.")
        if not is_drawn:  # what the published program computes, so that it can be exported
            return replace(FLAX_T5_VAE, latent_tokens=count, **common)
        common["latent_tokens"] = count
    return T5VAEConfig(pooling=shape.pooling, variational=is_drawn, inner_dim=shape.inner_dim, **common)  # pyright: ignore[reportArgumentType]


def batches_of(work: Work, samples: Samples, training: Settled, mesh: Any) -> Batches:
    """The lines that are trained on, all padded to one length."""
    return Batches(
        [row[row != work.padding_id] for row in work.lines.ids[~work.lines.held]],
        Buckets(batch_size=training.batch_size, lengths=(samples.length,)),
        padding_id=work.padding_id,
        seed=training.seed,
        process=row_share(mesh),
    )
