"""Files written in the background, one after another, while training goes on."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor


def copied(state: Any, memo: dict[int, Any]) -> Any:
    """A copy of a nest in main memory, since a GPU may be full; on a CPU what is shared stays so."""
    if isinstance(state, Tensor) and state.device.type != "cpu":
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: copied(value, memo) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value, memo) for value in state)
    return copy.deepcopy(state, memo)


class Writer:
    """A queue of jobs that write files; a job runs only if those before it succeeded.

    What goes wrong in one is raised where the next is waited for. torch.distributed.checkpoint's async_save
    writes folders of shards; ours are single files that every reader of checkpoints opens.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.last: Future | None = None

    def add(self, job: Callable[..., None], *args: Any, **options: Any) -> None:
        """Adds a job, which starts when the one before it has ended."""
        before = self.last

        def run() -> None:
            if before:
                before.result()
            job(*args, **options)

        self.last = self.thread.submit(run)

    def add_copy(self, state: Any, save: Callable[..., None], path: Path, **options: Any) -> None:
        """Adds the job `save(path, state, **options)` of the state as it is now; waits for those before it.

        So no two checkpoints are written at once, and there is at most one copy of a state.
        """
        self.wait()
        self.add(save, path, copied(state, {}), **options)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Everything is written; what failed is raised, unless another error ends the block."""
        if kind is None:
            self.wait()
        wait([self.last] if self.last else [])

    def wait(self) -> None:
        """Returns once everything is on the disk; raises what kept the first failed job from it."""
        if self.last:
            self.last.result()
