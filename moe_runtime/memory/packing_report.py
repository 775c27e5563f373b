"""What packing a model, or unpacking one, came to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.memory.packed_folder import Manifest
from moe_runtime.memory.safetensors_header import parse_header


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The bytes of a packed folder and of its source. `expert_*` count the packed tensors.

    `num_unpaid` tensors of experts stayed as they are: packing them does not pay.
    """

    folder: Path
    source_bytes: int
    packed_bytes: int
    expert_bytes: int
    packed_expert_bytes: int
    num_packed: int
    num_unpaid: int
    seconds: float

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, *, num_unpaid: int, seconds: float) -> "Packing":
        """The figures of the files in `manifest`; the call that made `folder` took `seconds`."""
        files = manifest.files
        return cls(
            folder=folder,
            source_bytes=sum(file.source_bytes for file in files.values()),
            packed_bytes=sum(file.num_bytes for file in files.values()),
            expert_bytes=sum(
                tensor.num_bytes
                for name, file in files.items()
                for tensor in parse_header(
                    Path(name), file.source_header.encode(), file.source_bytes
                ).values()
                if tensor.name in file.runs
            ),
            packed_expert_bytes=sum(
                run.num_bytes
                for file in files.values()
                for runs in file.runs.values()
                for run in runs
            ),
            num_packed=sum(len(file.runs) for file in files.values()),
            num_unpaid=num_unpaid,
            seconds=seconds,
        )

    @property
    def expert_share(self) -> float | None:
        """Bytes of the packed tensors as a share of what they were; None if there are none."""
        return self.packed_expert_bytes / self.expert_bytes if self.expert_bytes else None

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "folder": str(self.folder),
            "source_bytes": self.source_bytes,
            "packed_bytes": self.packed_bytes,
            "expert_bytes": self.expert_bytes,
            "packed_expert_bytes": self.packed_expert_bytes,
            "expert_share": self.expert_share,
            "packed_tensors": self.num_packed,
            "tensors_left_as_they_are": self.num_unpaid,
            "seconds": self.seconds,
        }
