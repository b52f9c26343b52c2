"""What is converted: three literal dictionaries."""

from . import bert, distilbert, electra, functional, gpt2, haiku_lm, llama, roberta, roberta_tf, t5, t5_vae

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
        t5.FAMILY,
        t5.MT5_FAMILY,
        t5.UMT5_FAMILY,
    )
}
# Directories of a system that the reference library does not have, by the same word: nothing there to verify against.
ORIGINALS = {t5_vae.FAMILY.model_type: t5_vae.FAMILY}
DIRECTORIES = FAMILIES | ORIGINALS
# Directories whose config.json names neither a type nor a class: told by the fields that it has, and only read.
UNNAMED = {frozenset({"ae_latent_size", "set_seq_size", "t5"}): t5_vae.TORCH}
# Dictionaries of arrays, by the name that `from_arrays` has for each: the family, and what prepares its arrays.
FORMATS = {
    "roberta-tf": (roberta_tf.FAMILY, roberta_tf.prepare),
    "haiku-lm-tutorial": haiku_lm.TUTORIAL,
    "haiku-lm-example": haiku_lm.EXAMPLE,
    "t5-vae-torch": (t5_vae.TORCH, t5_vae.prepare),
    "functional-transformer": (functional.FAMILY, functional.prepare),
}
