"""Where experts come from when no memory holds them."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.ahead_line import AheadLine, AheadRead
from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.blob_map import BlobMap
from moe_runtime.memory.disk import DiskReader
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.read_watch import ReadWatch


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
    """Experts in the files of a checkpoint, as `blobs` has them.

    Of quantised ones every scale is looked at when it arrives: a device must not be asked for
    numbers. A load raises CheckpointError, naming tensor and file, where one is not.
    """

    def __init__(self, blobs: BlobMap, reader: DiskReader) -> None:
        self._blobs = blobs
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
        layout = self._blobs.layout(key)
        check = _check(layout, blob)
        self._reader.submit(self._blobs.extents(key), layout, blob, load, check)

    def ahead_read(self, key: ExpertKey, blob: Blob, load: Load) -> AheadRead:
        assert isinstance(load, ExpertLoad)
        layout = self._blobs.layout(key)
        check = _check(layout, blob)
        return self._reader.ahead_read(self._blobs.extents(key), layout, blob, load, check)

    def set_watch(self, watch: ReadWatch | None) -> None:
        self._reader.watch = watch

    def close(self) -> None:
        self._reader.close()


def _check(layout: ExpertLayout, blob: Blob) -> Callable[[], None] | None:
    """What looks at the numbers that were read into `blob`, where it holds quantised ones."""
    compact = layout.compact
    return None if compact is None else partial(compact.check, torch.from_numpy(blob))
