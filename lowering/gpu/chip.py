"""Numbers of a Hopper GPU that several kernels need."""

# Rows of a wgmma, the matrix product of a warpgroup.
WGMMA_ROWS = 64
# The rows whose bytes in shared memory are permuted together ("swizzled"). The copy engine moves
# them whole: in memory, it starts at a multiple of so many positions.
SWIZZLE_ROWS = 8
# Elements that one copy moves at most along each dimension.
MOST_COPIED = 256
# Multiprocessors of an H100 or H200. The kernels are right for any number.
MULTIPROCESSORS = 132
# Bytes of shared memory for a CTA's arrays. It has 227 kB; JAX keeps 2 of them for reductions, and
# barriers have their place in the last one.
SHARED_MEMORY = 224 * 1024


def ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
