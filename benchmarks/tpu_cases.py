"""Programs for the TPU compiler, without a TPU: for the benchmark of schedules and for tests."""

import dataclasses

# A topology of each generation, by which libtpu is told what to compile for.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Head counts, head dimension and queries of a row."""

    Hq: int
    Hkv: int
    D: int
    Q: int = 1

    def __str__(self) -> str:
        return f"{self.Hq}/{self.Hkv}/{self.D}" + (f" Q={self.Q}" if self.Q > 1 else "")


SCHEDULED = (
    Scheduled(32, 8, 128),
    Scheduled(64, 8, 128),
    Scheduled(32, 32, 128),
    Scheduled(16, 2, 256),
    Scheduled(8, 1, 128),
    Scheduled(64, 8, 64),
    Scheduled(32, 8, 128, Q=8),
    Scheduled(64, 8, 64, Q=8),
)
