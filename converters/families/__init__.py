"""What is converted: two literal dictionaries."""

from . import bert, distilbert, electra, functional, gpt2, haiku_lm, llama, roberta, roberta_tf

# Families of the reference library, by the word for each in config.json.
FAMILIES = {
    family.model_type: family
    for family in (
        bert.FAMILY,
        roberta.FAMILY,
        roberta.XLM,
        distilbert.FAMILY,
        electra.FAMILY,
        gpt2.FAMILY,
        llama.FAMILY,
        llama.MISTRAL_FAMILY,
        llama.QWEN2_FAMILY,
        llama.QWEN3_FAMILY,
    )
}
# Dictionaries of arrays, by the name that `from_arrays` has for each: the family, and what prepares its arrays.
FORMATS = {
    "roberta-tf": (roberta_tf.FAMILY, roberta_tf.prepare),
    "haiku-lm-tutorial": haiku_lm.TUTORIAL,
    "haiku-lm-example": haiku_lm.EXAMPLE,
    "functional-transformer": (functional.FAMILY, functional.prepare),
}
