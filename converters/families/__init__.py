"""The families that are converted: one literal dictionary, by the word for each in config.json."""

from . import bert, distilbert, electra, roberta

FAMILIES = {
    family.model_type: family
    for family in (bert.FAMILY, roberta.FAMILY, roberta.XLM, distilbert.FAMILY, electra.FAMILY)
}
