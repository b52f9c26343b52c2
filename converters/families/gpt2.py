"""GPT-2: openai-community/gpt2, distilbert/distilgpt2 and their kin. Reference: transformers' gpt2.

Its linear layers hold (inputs, outputs), queries, keys and values side by side. The first published file is spelled as
a bare model's and has buffers; tied, it is a whole language model all the same.
"""

from eqx_transformers import GPT2, CausalLM, GPT2Config, SequenceClassifier

from ..config import OLDER, aliases, choice, fact, flag, optional, rate, size, some, whole
from ..family import Family
from ..ops import FLIP, split
from ..rules import Ignore, Rule, Table, affine, rule
from ._decoder import FIXED, IRRELEVANT, PADDING, SURPLUS, head, inputs, observe, options, probes, settle
from ._shared import ACTIVATIONS, labels, ours

PREFIX = "transformer."
LAYER, BLOCK = "h.{i}", "stack.blocks.{i}"


def table(config: GPT2Config, model_class: type) -> Table:
    layer, block = f"{PREFIX}{LAYER}", f"{ours(model_class)}{BLOCK}"
    embedding, tokens = f"{ours(model_class)}embedding", f"{PREFIX}wte.weight"
    return (
        rule(tokens, f"{embedding}.tokens.weight"),
        rule(f"{PREFIX}wpe.weight", f"{embedding}.positions.weight"),
        *affine(f"{layer}.ln_1", f"{block}.attention_norm"),
        *fused(config, f"{layer}.attn.c_attn", f"{block}.attention"),
        *turned(f"{layer}.attn.c_proj", f"{block}.attention.output_proj"),
        *affine(f"{layer}.ln_2", f"{block}.mlp_norm"),
        *turned(f"{layer}.mlp.c_fc", f"{block}.mlp.up_proj"),
        *turned(f"{layer}.mlp.c_proj", f"{block}.mlp.down_proj"),
        *affine(f"{PREFIX}ln_f", f"{ours(model_class)}norm"),
        *head(config, model_class, tokens),
        Ignore(f"{PREFIX}h.*.attn.bias", "a buffer, which token sees which: computed"),
        Ignore(f"{PREFIX}h.*.attn.masked_bias", "a buffer, the score of what is not seen: computed"),
        *SURPLUS,
    )


def turned(theirs: str, own: str) -> tuple[Rule, Rule]:
    """`affine`, of a weight that is (inputs, outputs)."""
    return rule(f"{theirs}.weight", f"{own}.weight", FLIP), rule(f"{theirs}.bias", f"{own}.bias")


def fused(config: GPT2Config, theirs: str, own: str) -> tuple[Rule, Rule]:
    """Queries, keys and values in one."""
    parts = split(*[config.embed_dim] * 3)
    names = lambda last: tuple(f"{own}.{part}_proj.{last}" for part in ("query", "key", "value"))
    return (
        rule(f"{theirs}.weight", names("weight"), FLIP.then(parts)),
        rule(f"{theirs}.bias", names("bias"), parts),
    )


PARTS = (
    ("embedding", "drop"),
    (f"{BLOCK}.attention_norm", f"{LAYER}.ln_1"),
    (f"{BLOCK}.attention.output_proj", f"{LAYER}.attn.c_proj"),
    (f"{BLOCK}.mlp_norm", f"{LAYER}.ln_2"),
    (f"{BLOCK}.mlp.up_proj", f"{LAYER}.mlp.c_fc"),
    (f"{BLOCK}.mlp", f"{LAYER}.mlp"),
    (BLOCK, LAYER),
    ("norm", "ln_f"),
)
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

FAMILY = Family(
    model_type="gpt2",
    defaults=GPT2Config(),
    architectures={
        "GPT2Model": GPT2,
        "GPT2LMHeadModel": CausalLM,
        "GPT2ForSequenceClassification": SequenceClassifier,
    },
    like={},
    carries={},
    prefix=PREFIX,
    roots=("wte", "wpe", "h", "ln_f"),
    facts=(
        fact("vocab_size", "vocab_size", whole, 50257),
        fact("n_embd", "embed_dim", whole, 768),
        fact("n_layer", "num_layers", whole, 12),
        fact("n_head", "num_heads", some, 12),
        fact("n_inner", "mlp_dim", optional(some), None),
        fact("n_positions", "max_positions", whole, 1024),
        fact("layer_norm_epsilon", "norm_eps", size, 1e-5),
        choice("activation_function", "activation", ACTIVATIONS, "gelu_new"),
        PADDING,
        fact("resid_pdrop", "dropout", rate, 0.1),
        fact("embd_pdrop", "embedding_dropout", rate, 0.1),
        fact("attn_pdrop", "attention_dropout", rate, 0.1),
        fact("initializer_range", "init_std", size, 0.02),
        fact("tie_word_embeddings", "tied", flag, True),
        labels(),
    ),
    fixed=FIXED
    | {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
    },
    irrelevant=IRRELEVANT
    | {
        "n_ctx",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    },
    table=table,
    observe=observe,
    legacy={},
    older=(*OLDER, *aliases(ALIASES)),
    flax={"ln_1": "scale", "ln_2": "scale", "ln_f": "scale", "wte": "embedding", "wpe": "embedding"},
    probes=probes(PREFIX, PARTS),
    inputs=inputs,
    options=options,
    settle=settle,
    reads="last",
)
