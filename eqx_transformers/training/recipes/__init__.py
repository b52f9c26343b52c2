"""Applications: each a command, `python -m eqx_transformers.training.recipes.NAME`, and a function of the same name."""
