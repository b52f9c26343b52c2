"""Rules of where a model's arrays lie on a mesh: patterns of paths, and the three usual sets of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec as P

from ..surgery.patterns import parse
from .mesh import AnyMesh, expect_auto, spelled

DATA, MODEL = "data", "model"


@dataclass(frozen=True)
class Rule:
    """Arrays whose paths fit a pattern (`surgery.patterns` has the grammar) are divided as `spec` says.

    `spec` has one entry for each axis of the array: a mesh axis, a tuple of them, or None; what it does not reach is
    not divided. Of stacked blocks it says the axes of one layer's array: the layer axis in front is never divided.
    `optional`: a model in which nothing fits is no error.
    """

    pattern: str
    spec: P
    optional: bool = False

    def __post_init__(self):
        parse(self.pattern)
        if not isinstance(self.spec, P):
            raise TypeError(f"{self.pattern}: {self.spec!r} is no PartitionSpec.")

    @property
    def axes(self) -> set[str]:
        """The mesh axes that it names."""
        return {name for entry in self.spec for name in names(entry)}


@dataclass(frozen=True)
class Rules:
    """For every array the first rule that fits; `spread` names a mesh axis over which then each array's largest axis
    that is left, and that it divides, is divided too.

    `a | b` has the rules of `a` before those of `b`, and both spreads. Where rules are taken, a sequence of pairs
    (pattern, spec) or a mapping does as well, each spec a `PartitionSpec`, a tuple of names and None, or one name:

        [("**.mlp.up_proj.weight", P("model", None)), ("**.mlp.down_proj.weight", (None, "model"))] | DATA_PARALLEL
    """

    rules: tuple[Rule, ...] = ()
    spread: tuple[str, ...] = ()

    @property
    def axes(self) -> set[str]:
        """The mesh axes that are named."""
        return set(self.spread).union(*(rule.axes for rule in self.rules))

    def __or__(self, other: Any) -> "Rules":
        other = as_rules(other)
        return Rules(self.rules + other.rules, tuple(dict.fromkeys(self.spread + other.spread)))

    def __ror__(self, other: Any) -> "Rules":
        return as_rules(other) | self


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def as_rules(given: Any) -> Rules:
    """Rules from what may stand for them. Raises a `TypeError` for what may not, and for a malformed rule."""
    if isinstance(given, Rules):
        return given
    pairs = given.items() if isinstance(given, Mapping) else given
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"Rules are Rules, or pairs (pattern, spec), and not {given!r}.")
    return Rules(tuple(x if isinstance(x, Rule) else _rule(x) for x in pairs))


def _rule(pair: Any) -> Rule:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
        raise TypeError(f"A rule is a pair (pattern, spec), and not {pair!r}.")
    pattern, spec = pair
    if isinstance(spec, P):
        return Rule(pattern, spec)
    entries = spec if isinstance(spec, tuple | list) else (spec,)
    flat = [name for entry in entries for name in (entry if isinstance(entry, tuple | list) else (entry,))]
    if not all(name is None or isinstance(name, str) for name in flat):
        raise TypeError(f"{pattern}: a spec has for each axis a name, a tuple of names or None, not {spec!r}.")
    return Rule(pattern, P(*(tuple(entry) if isinstance(entry, list) else entry for entry in entries)))


def expect_axes(rules: Rules, mesh: AnyMesh) -> None:
    """Raises a `ValueError` where rules name an axis that a mesh has not, and as `expect_auto` does."""
    expect_auto(mesh)
    if unknown := sorted(rules.axes - set(mesh.axis_names)):
        raise ValueError(
            f"The rules divide along {', '.join(map(repr, unknown))}, but the axes of this mesh are {spelled(mesh)}."
            f' An axis of size 1 divides nothing: make_mesh("{spelled(mesh)},{unknown[0]}=1").'
        )


def _built_in(*pairs: tuple[str, P]) -> Rules:
    """Made for all families, of which none has all there is."""
    return Rules(tuple(Rule(pattern, spec, optional=True) for pattern, spec in pairs))


DATA_PARALLEL = Rules()
FULLY_SHARDED = Rules(spread=(DATA,))

_COLUMN = "{query,key,value,gate,up}_proj"  # outputs divided: heads, and the MLP's inner features
_ROW = "{output,down}_proj"  # inputs divided; what the devices have is then summed
_OUTPUTS = "{weight,bias,numbers,scale,b,b_bias,magnitude}"  # arrays whose first axis is a layer's outputs
_INPUTS = "{weight,numbers,a}"  # arrays whose second axis is its inputs
_TABLE = "{weight,bias,numbers,scale}"

# Megatron's division (Shoeybi et al. 2019, arXiv:1909.08053). What is not named here is on every device: norms,
# positions, poolers and heads of few labels.
TENSOR_PARALLEL = _built_in(
    ("**.adapters.*.{scale,salt}", P()),  # numbers
    (f"**.{_COLUMN}.**.{_OUTPUTS}", P(MODEL)),
    (f"**.{_ROW}.**.{_INPUTS}", P(None, MODEL)),
    # Tables of a vocabulary, its first axis; `base` is what an adapter stands on.
    (f"**.embedding.{_TABLE}", P(MODEL)),
    (f"**.embedding.{{tokens,base}}.**.{_TABLE}", P(MODEL)),
    ("**.embedding.adapters.*.a", P(None, MODEL)),
    ("**.embedding.tokens.adapters.*.a", P(None, MODEL)),
    (f"**.head.{_TABLE}", P(MODEL)),
    (f"**.head.{{decoder,base}}.**.{_TABLE}", P(MODEL)),
    ("**.head.**.adapters.*.b", P(MODEL)),
)


def rules_for(mesh: AnyMesh, *, fully_sharded: bool = False) -> Rules:
    """The usual rules of a mesh by its axes: `TENSOR_PARALLEL` where there is "model", and `FULLY_SHARDED` over "data"
    if asked for; else arrays are on every device (`DATA_PARALLEL`), and the batch alone is divided.

    Raises a `ValueError` for a mesh without "data", or with axes other than these two.
    """
    expect_auto(mesh)
    if DATA not in mesh.axis_names or set(mesh.axis_names) - {DATA, MODEL}:
        raise ValueError(
            f'A mesh for training has the axes "data" (rows of a batch) and, if wanted, "model" (parts of a layer);'
            f' this one is {spelled(mesh)}. "data=1,model=4" divides the model alone.'
        )
    rules = FULLY_SHARDED if fully_sharded else DATA_PARALLEL
    return rules | TENSOR_PARALLEL if MODEL in mesh.axis_names else rules
