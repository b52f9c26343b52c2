"""What the reference library's Flax models call their tensors, and how they turn them.

The rule of transformers 4: modules are named as in torch, with "/" between them. A linear layer's weight is a `kernel`
of (inputs, outputs), a LayerNorm's is `scale`, an RMSNorm's `weight`, an embedding's `embedding`. Where torch's layers
hold (inputs, outputs), as GPT-2's do, Flax's hold (outputs, inputs): every kernel is turned. Tied, the decoder of a
masked-LM head, or the output of a causal one, has no parameters. Untied, that of BERT and RoBERTa has a kernel and no
bias: the head's one bias is its own, where torch lists it twice. All of it from transformers 4's modeling_flax_*.py and
modeling_flax_pytorch_utils.py.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eqx_transformers.tensor_file import Spec

from .errors import UnsupportedConfig
from .spelling import Spelling

if TYPE_CHECKING:
    from .family import Family
else:
    Family = object  # whose file imports this one, by way of the containers

ENDINGS = ("kernel", "scale", "embedding")
HEADS = ("cls.predictions", "lm_head")  # whose bias torch lists a second time, as the decoder's

NOTE = "names are Flax's: / stands for ., and kernels are turned"


def turned(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The tensors as torch has them: kernels that are matrices are transposed. Nothing is copied."""
    is_kernel = lambda key, spec: key.rsplit("/", 1)[-1] == "kernel" and len(spec.shape) == 2
    return {key: spec.transposed if is_kernel(key, spec) else spec for key, spec in specs.items()}


def dotted(key: str) -> str:
    """A key as torch would spell it."""
    *modules, last = key.split("/")
    return ".".join((*modules, "weight" if last in ENDINGS else last))


def _by_dotted(keys: Iterable[str]) -> dict[str, str]:
    """Of two keys of one dotted name, the second stands for itself."""
    names: dict[str, str] = {}
    for key in sorted(keys, key=lambda key: dotted(key) != key):  # itself: a name that no other may take from it
        name = dotted(key)
        names[key if name in names else name] = key
    return names


@dataclass(frozen=True)
class Flax:
    """The general rule, and below it the family's own spelling: with or without prefix, in old or new endings."""

    inner: Spelling
    endings: Mapping[str, str]

    @classmethod
    def of(cls, keys: Collection[str], family: Family) -> "Flax":
        """Raises an `UnsupportedConfig` for a family of which the reference had no Flax models."""
        if family.flax is None:
            raise UnsupportedConfig(
                f"The weights are a Flax file, but transformers never had {family.model_type} in Flax: what such a file"
                " calls its tensors, and how they lie, would be guessed. Convert safetensors or pytorch_model.bin."
            )
        return cls(family.spell(_by_dotted(keys), family), family.flax)

    def names(self, keys: Collection[str]) -> dict[str, str]:
        """See `Spelling`. A bias that torch lists twice has both names."""
        keys_by_dotted = _by_dotted(keys)
        names = {name: keys_by_dotted[key] for name, key in self.inner.names(keys_by_dotted).items()}
        for head in HEADS:
            if {f"{head}.bias", f"{head}.decoder.weight"} <= names.keys():
                names.setdefault(f"{head}.decoder.bias", names[f"{head}.bias"])
        return names

    def old(self, key: str) -> str:
        """See `Spelling`; the kind of a layer is guessed from its name."""
        if key in [f"{head}.decoder.bias" for head in HEADS]:
            key = key.replace(".decoder", "")
        *modules, last = self.inner.old(key).split(".")
        return "/".join((*modules, self._ending(modules[-1]) if modules and last == "weight" else last))

    def _ending(self, module: str) -> str:
        return next((word for end, word in self.endings.items() if module.lower().endswith(end)), "kernel")
