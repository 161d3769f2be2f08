"""A walk whose blocks come with what the dense model knows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from billhook.calibrate import distributed
from billhook.calibrate.walk import Block, Walk

T = TypeVar("T")


def with_dense(walk: Walk, gather: Callable[[Block], T]) -> Iterator[tuple[Block, T]]:
    """The blocks of a walk, each with what `gather` finds on the inputs that the block has in the dense model.

    A second walk, which edits nothing, runs one block ahead: it passes a block's dense outputs on before the block is
    edited. Statistics of one block are alive at a time; hidden states are kept twice, and two blocks are loaded. A
    resumed walk passes the finished blocks once more through the dense model, whose weights it still has then.

    Args:
        walk: a walk that was not started.
        gather: called with a block of the look, inside its turn; collects there.
    """
    done = distributed.agree(walk.journal.finished() if walk.journal else 0)
    look = walk.dense()
    look.companions = walk.companions
    # both walks hold a no_grad() of their own and end in either order: this one sees to what is restored
    with torch.no_grad():
        dense, blocks = iter(look), iter(walk)
        try:
            ahead = next(dense)
            for _ in range(done):
                ahead = next(dense)
            while True:
                found = gather(ahead)
                following = next(dense, None)
                block = next(blocks)
                block.observe()  # for the report: nothing is collected on the inputs of the pruned model
                yield block, found
                del found
                if following is None:
                    break
                ahead = following
            for _ in blocks:  # lets the last block be finished
                pass
        finally:
            for running in (blocks, dense):
                close = getattr(running, "close", None)
                if close is not None:
                    close()
            look.close()
