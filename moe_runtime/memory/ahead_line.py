"""Experts that are read before anybody asks for them, while the disk has nothing else to do."""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.reader_pool import ReaderPool

Piece = Callable[[], None]


class AheadRead:
    """One of them: pieces that nobody has taken yet, and the load that is done after the last.

    `busy` is held while the line reads a piece: with none left and `busy` free, nothing writes to
    the blob any more.
    """

    __slots__ = ("busy", "load", "num_pieces", "on_complete", "pieces")

    def __init__(
        self, pieces: deque[Piece], load: ExpertLoad, on_complete: Callable[[], None] | None
    ) -> None:
        self.pieces = pieces
        self.num_pieces = len(pieces)
        self.load = load
        self.on_complete = on_complete
        self.busy = threading.Lock()

    @property
    def has_started(self) -> bool:
        """Whether a piece of it was taken."""
        return len(self.pieces) < self.num_pieces

    @property
    def share_taken(self) -> float:
        """Of its pieces, those that are read or being read."""
        return 1.0 - len(self.pieces) / self.num_pieces


class AheadLine:
    """A line of reads of which one piece at a time is read, the first in line first.

    After each piece the line stands behind all jobs that `pool` has by then: what is demanded waits
    for one piece at most that nobody had asked for. All methods are for the thread that owns the
    reads; pieces run on those of the pool.
    """

    def __init__(self, pool: ReaderPool) -> None:
        self._pool = pool
        self._reads: deque[AheadRead] = deque()
        # Held by the job that goes along the line, from when it is handed out until all is read.
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return len(self._reads)

    def append(self, read: AheadRead) -> None:
        """Read it once nothing that was demanded waits. Until it left the line nobody may wait.

        If this raises, nothing writes to the blob of `read`.
        """
        try:
            read.load.begin(read.num_pieces)
            self._reads.append(read)
            self._go_along()
        except BaseException:
            self.cancel(read)
            raise

    def remove(self, read: AheadRead) -> bool:
        """What is left of `read` stays with the caller; False if it had left the line before."""
        try:
            self._reads.remove(read)
        except ValueError:
            return False
        return True

    def promote(self, read: AheadRead) -> None:
        """What is left of `read` is demanded now. If this raises, its load is settled."""
        try:
            self.remove(read)
            _hand_out(self._pool, read.pieces, read.load, read.on_complete)
        except BaseException as error:
            _give_up(read.pieces, read.load, error)
            raise

    def demote(self, read: AheadRead) -> None:
        """`read` goes on after all others."""
        if self.remove(read):
            self._reads.append(read)

    def cancel(self, read: AheadRead) -> None:
        """Drop what is left of `read`; nothing writes to its blob after this. Safe to repeat."""
        read.pieces.clear()
        self.remove(read)
        with read.busy:  # sync: at most one piece of an expert
            pass

    def clear(self) -> None:
        """Cancel all."""
        for read in list(self._reads):
            self.cancel(read)

    def _go_along(self) -> None:
        """See that somebody goes along the line, if there is anything in it."""
        if self._reads and self._turn.acquire(blocking=False):
            self._pool.submit(self._run)

    def _run(self) -> None:
        """One piece of the first in line; then once more, behind what is demanded by then."""
        try:
            read = self._reads[0]
        except IndexError:
            self._turn.release()
            self._go_along()  # of what came in between
            return
        with read.busy:
            run_piece(read.pieces, read.load, read.on_complete)
        if not read.pieces:
            self.remove(read)
        self._pool.submit(self._run)


def run_piece(
    pieces: deque[Piece], load: ExpertLoad, on_complete: Callable[[], None] | None
) -> None:
    """Take and run one piece, if one is left, and account for it. Raises nothing."""
    piece = take(pieces)
    if piece is None:
        return
    error: BaseException | None = None
    try:
        piece()
    except BaseException as caught:  # carried to whoever waits for the expert
        error = caught
    load.account(error, on_complete)


def read_now(
    pool: ReaderPool,
    pieces: deque[Piece],
    load: ExpertLoad,
    on_complete: Callable[[], None] | None,
) -> None:
    """Let `pool` run all pieces. If this raises (an interrupt), `load` is settled."""
    try:
        load.begin(len(pieces))
        _hand_out(pool, pieces, load, on_complete)
    except BaseException as error:
        _give_up(pieces, load, error)
        raise


def _hand_out(
    pool: ReaderPool,
    pieces: deque[Piece],
    load: ExpertLoad,
    on_complete: Callable[[], None] | None,
) -> None:
    for _ in range(len(pieces)):
        pool.submit(partial(run_piece, pieces, load, on_complete))


def _give_up(pieces: deque[Piece], load: ExpertLoad, error: BaseException) -> None:
    """No more pieces are begun; returns when none is under way."""
    while load.has_begun and take(pieces) is not None:  # whoever takes one accounts for it
        load.account(error, None)
    load.settle()


def take(pieces: deque[Piece]) -> Piece | None:
    """The next, or None when somebody else took the last."""
    try:
        return pieces.popleft()
    except IndexError:
        return None
