"""The threads that two groups of a pass run in, and their shares of the processor."""

from concurrent.futures import ThreadPoolExecutor

import torch


class GroupThreads:
    """A thread for each group, and one in which they attend.

    OpenMP and MKL keep a number of threads for each thread that calls them: the groups' products
    have `num_products` and attention `num_attention`. Whoever made this keeps its own.
    """

    def __init__(self, *, num_products: int, num_attention: int) -> None:
        self.num_products = num_products
        self.num_attention = num_attention
        self.groups = tuple(ThreadPoolExecutor(1, f"moe-runtime-group-{n}") for n in range(2))
        self.attention = ThreadPoolExecutor(1, "moe-runtime-attention")
        before = torch.get_num_threads()
        try:
            for thread in self.groups:
                thread.submit(torch.set_num_threads, num_products).result()
            self.attention.submit(torch.set_num_threads, num_attention).result()
        finally:
            torch.set_num_threads(before)  # threads to come take the last number set anywhere

    def close(self) -> None:
        """End the threads when they have done what they do. Safe to call twice."""
        for thread in (*self.groups, self.attention):
            thread.shutdown(wait=False)
