"""One pool of ranks for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.parallel.rank_pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    made = RankPool()
    yield made
    made.close()
