"""The generations of TPU, as the cost model sees them."""

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore, as a device of JAX uses it.

    Attributes:
      name: of the generation.
      vmem: bytes of VMEM of a core.
      dma_cycles: cycles that the core's share of HBM bandwidth takes for 1 MiB: published
        bandwidth, and a clock estimated from published peak rates.
      mib_cycles: cycles of compute for 1 MiB of cache, fitted as the next two to the compiler's
        schedules.
      register_cycles: more for a register of logits in its products.
      stride_cycles: more for a sublane between the rows that a strided load takes.
      byte_cycles: more for 1 MiB of bytes where each head is read by itself: its bytes are shifted
        out of words, where newer chips unpack all heads at once.
      cores: cores that one device drives: 2 for a megacore.
      tall_tiles: whether XLA keeps 16 rows of 16-bit numbers together, and not 8. It keeps 32 rows
        of bytes together on all chips.
      reason: why there are no kernels for it, or None.
    """

    name: str
    vmem: int
    dma_cycles: int
    mib_cycles: int
    register_cycles: float
    stride_cycles: int
    byte_cycles: int = 0
    cores: int = 1
    tall_tiles: bool = False
    reason: str | None = None


_OLD = "Mosaic does not compile the kernels for TPU v3 and older"

_CHIPS = {
    "TPU v2": Chip("v2", 16 * MIB, 2000, 320, 3.8, 110, reason=_OLD),
    "TPU v3": Chip("v3", 16 * MIB, 2000, 320, 3.8, 110, reason=_OLD),
    "TPU v4": Chip("v4", 16 * MIB, 1790, 320, 3.8, 110, cores=2),
    "TPU v4 lite": Chip("v4i", 16 * MIB, 1790, 320, 3.8, 110),
    "TPU v5 lite": Chip("v5e", 128 * MIB, 1920, 250, 3.0, 32),
    "TPU v5e": Chip("v5e", 128 * MIB, 1920, 250, 3.0, 32),
    "TPU v5": Chip("v5p", 64 * MIB, 1490, 250, 3.0, 32, cores=2),
    "TPU v5p": Chip("v5p", 64 * MIB, 1490, 250, 3.0, 32, cores=2),
    "TPU v6 lite": Chip("v6e", 128 * MIB, 1120, 315, 1.8, 32, 400),
    "TPU v6e": Chip("v6e", 128 * MIB, 1120, 315, 1.8, 32, 400),
    "TPU7x": Chip("7x", 64 * MIB, 620, 300, 1.8, 32, 400, tall_tiles=True),
}

# The chip of a program lowered for no known device (jax.export): its blocks fit and fill them all.
_ANY = Chip("any", 16 * MIB, 1120, 320, 3.8, 110, cores=2, tall_tiles=True)


def chip_of(device_kind: str | None) -> Chip:
    """The chip of a `device_kind`; for an unknown one, a chip whose blocks fit all."""
    return _ANY if device_kind is None else _CHIPS.get(device_kind, _ANY)
