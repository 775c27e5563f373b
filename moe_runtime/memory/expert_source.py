"""Where experts come from when no memory holds them."""

from typing import Protocol

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.ahead_line import AheadLine, AheadRead
from moe_runtime.memory.disk import Blob, DiskReader
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.read_watch import ReadWatch
from moe_runtime.memory.tensor_map import TensorMap


class Load(Protocol):
    """One expert on its way into host memory; see ExpertLoad."""

    @property
    def is_done(self) -> bool:
        """Whether it is over, well or not. Never blocks."""

    @property
    def has_arrived(self) -> bool:
        """Whether everything was read without an error."""

    def settle(self) -> None:
        """Block until it is over, whatever came of it; at once if it never began."""

    def wait(self) -> None:
        """Block until it is over; raise what went wrong."""


class ExpertSource(Protocol):
    """Reads experts in the background. A load stands in its owner's books before it starts.

    `ahead` is the line of reads that nobody has demanded.
    """

    @property
    def ahead(self) -> AheadLine: ...

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the disk so far."""

    def new_load(self) -> Load:
        """A load for `start`."""

    def start(self, key: ExpertKey, blob: Blob, load: Load) -> None:
        """Start to read `key` into `blob`. If it raises, nothing writes to `blob` any more."""

    def ahead_read(self, key: ExpertKey, blob: Blob, load: Load) -> AheadRead:
        """A read for the line `ahead`, which does nothing before it is put there."""

    def set_watch(self, watch: ReadWatch | None) -> None:
        """Tell `watch` of every read, from now on."""

    def close(self) -> None:
        """Finish what is under way, and free threads and files."""


class DiskSource:
    """Experts in the files of a checkpoint."""

    def __init__(self, tensor_map: TensorMap, reader: DiskReader) -> None:
        self._tensor_map = tensor_map
        self._reader = reader

    @property
    def ahead(self) -> AheadLine:
        return self._reader.ahead

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def new_load(self) -> ExpertLoad:
        return ExpertLoad()

    def start(self, key: ExpertKey, blob: Blob, load: Load) -> None:
        assert isinstance(load, ExpertLoad)
        self._reader.submit(self._tensor_map.extents(key), self._tensor_map.layout(key), blob, load)

    def ahead_read(self, key: ExpertKey, blob: Blob, load: Load) -> AheadRead:
        assert isinstance(load, ExpertLoad)
        extents, layout = self._tensor_map.extents(key), self._tensor_map.layout(key)
        return self._reader.ahead_read(extents, layout, blob, load)

    def set_watch(self, watch: ReadWatch | None) -> None:
        self._reader.watch = watch

    def close(self) -> None:
        self._reader.close()
