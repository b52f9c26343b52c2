"""Which modules of a model have an adapter, and which tensors its directory must hold, by its configuration."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedConfig
from .modules import WEIGHT, Modules, Site
from .settings import Settings
from .targets import is_saved, is_target, matched

PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".ia3_l")
OLD = {".lora_magnitude_vector.weight": ".lora_magnitude_vector"}
TOKENS = ".token_adapter.trainable_tokens_delta"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A module of the reference that has an adapter, by its name there; `site` is the layer, or the one it is tied to.

    `is_table` of the module itself: the output that is tied to a table is none.
    """

    name: str
    site: Site
    is_table: bool

    @property
    def is_alias(self) -> bool:
        return self.name != self.site.name

    @property
    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        inputs, outputs = self.site.inputs, self.site.outputs
        return (inputs, outputs) if self.is_table == self.site.is_table else (outputs, inputs)

    def names(self, settings: Settings) -> dict[str, Shape]:
        """The tensors of its adapter, by the ends of their names."""
        inputs, outputs = self.sizes
        if settings.kind == "IA3":
            return {".ia3_l": (1, inputs) if is_target(self.name, settings.feedforward) else (outputs, 1)}
        rank = matched(settings.rank_pattern, self.name, settings.rank)
        a, b = ends(self.is_table)
        bias = {".lora_B.bias": (outputs,)} if settings.lora_bias and not self.is_table else {}
        magnitude = {".lora_magnitude_vector": (outputs,)} if settings.dora else {}
        return {a: (rank, inputs), b: (outputs, rank)} | bias | magnitude


def ends(is_table: bool) -> tuple[str, str]:
    """How the names of A and B end."""
    return (".lora_embedding_A", ".lora_embedding_B") if is_table else (".lora_A.weight", ".lora_B.weight")


def layers(settings: Settings, modules: Modules, names: Mapping[str, Any]) -> list[Layer]:
    """The modules with an adapter: those that the settings mean, or, where these do not say, those of the file."""
    everything = [Layer(site.name, site, site.is_table) for site in modules.sites.values()]
    for site in modules.sites.values():
        table = lambda alias: site.is_table and alias + ends(True)[0] in names  # noqa: B023
        everything += [Layer(alias, site, table(alias)) for alias in modules.aliases(site)]
    if settings.targets is None or settings.targets == "all-linear":
        return [one for one in everything if any(one.name + end in names for end in FACTORS)]
    given = (settings.targets, settings.exclude, settings.saved, settings.layers, settings.layers_pattern)
    meant = lambda one: is_target(one.name, *given)
    # With ensure_weight_tying, PEFT adapts the other end too, which the settings do not name.
    tied = lambda one: one.is_alias and is_target(one.site.name, *given) and one.name + ends(one.is_table)[0] in names
    return [one for one in everything if meant(one) or tied(one)]


def wanted(settings: Settings, modules: Modules, adapted: list[Layer]) -> dict[str, Shape | None]:
    """Every tensor that must be there, without the prefix, with its shape (None: that of the parameter)."""
    found: dict[str, Shape | None] = {}
    for layer in adapted:
        found |= {layer.name + end: shape for end, shape in layer.names(settings).items()}
    parameters = [*modules.parameters, *modules.ties]
    found |= dict.fromkeys(name for name in parameters if is_saved(name, settings.saved))
    stands = {layer.name for layer in adapted}
    for name in parameters:
        module, _, last = name.rpartition(".")
        if last == "bias" and (settings.bias == "all" or (settings.bias == "lora_only" and module in stands)):
            found[f"{module}.base_layer.bias" if module in stands else name] = None
    return found | {site.name + TOKENS: (len(rows), site.outputs) for site, rows in tokens(settings, modules)}


def tokens(settings: Settings, modules: Modules) -> Iterator[tuple[Site, tuple[int, ...]]]:
    """The tables of which rows are replaced, and which."""
    if settings.tokens is None:
        return
    tables = [site for site in modules.sites.values() if site.is_table]
    if isinstance(settings.tokens, tuple):  # of the input embedding, which the tables name first
        yield tables[0], settings.tokens
        return
    for end, rows in settings.tokens.items():
        found = [site for site in tables if is_target(site.name, (end,))]
        if not found:
            known = ", ".join(site.name for site in tables)
            raise UnsupportedConfig(f"trainable_token_indices: {end!r} is none of this model's tables: {known}.")
        yield from ((site, rows) for site in found)


def parameter_of(name: str) -> str:
    """The parameter that a tensor is, where it stands under an adapter."""
    return name.replace(".base_layer.", ".")


def is_extra(name: str, settings: Settings, modules: Modules, adapted: list[Layer]) -> bool:
    """Whether a tensor may be there or not: of what is adapted or of a vocabulary, and copies that PEFT writes."""
    if ".original_module." in name or ".modules_to_save." in name or modules.is_ignored(name):
        return True
    parameter = parameter_of(name)
    if parameter not in modules.parameters and parameter not in modules.ties:
        return False
    module = parameter.rpartition(".")[0]
    if parameter != name:
        return any(module == layer.name for layer in adapted)
    site = modules.sites.get(modules.ties.get(parameter, parameter).removesuffix(WEIGHT))
    vocab = next(one.inputs for one in modules.sites.values() if one.is_table)  # the tables name the tokens first
    return site is not None and (site.is_table or site.outputs == vocab)
