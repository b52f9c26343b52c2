"""The reference library's side of the benchmarks: models with random weights, and ours with the same."""

import tempfile
from typing import Any

import converters


def quiet() -> Any:
    """transformers, which says nothing from now on and draws the same weights every time."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    return transformers


def converted(reference: Any) -> Any:
    """Ours with the numbers of a model of transformers."""
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        return converters.load(directory)[0]


def version() -> str:
    import torch
    import transformers

    return f"{torch.__version__} ({torch.get_num_threads()} threads), transformers {transformers.__version__}"
