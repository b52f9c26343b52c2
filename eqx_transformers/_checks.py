"""`EQX_TRANSFORMERS_CHECK=1`: every shape annotation is checked at every call, and values at run time."""


def install() -> None:
    """Installs jaxtyping's import hook for this package; to be called before its modules are imported."""
    try:
        import beartype  # noqa: F401
    except ImportError as error:
        raise ImportError("EQX_TRANSFORMERS_CHECK=1 needs beartype: pip install 'eqx_transformers[check]'") from error
    from jaxtyping import install_import_hook

    install_import_hook("eqx_transformers", "beartype.beartype")
