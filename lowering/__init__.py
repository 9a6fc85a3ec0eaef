"""How the operations run: arrays and static parameters in, arrays out; no rules of JAX."""

if __name__ != "jax_ragged.lowering":
    raise ImportError(
        f"this folder is the package jax_ragged.lowering, imported as {__name__}: "
        "import jax_ragged.lowering instead"
    )
