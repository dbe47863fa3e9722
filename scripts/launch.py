"""torchrun, which ends with one line where a process of ours does: it takes torchrun's flags.

    python scripts/launch.py --nproc_per_node=8 main_earlyExit.py --model ...

torchrun itself puts a report of some forty lines below the line of a mistake, and exits with 1 for all.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import installed  # noqa: F401

# isort: split
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

SAID = (1, 2)  # what a process exits with that has said why: by a traceback, by one line


def main(argv: list[str]) -> int:
    """Runs torchrun; returns the exit code of the process that failed first, or 0."""
    logging.disable(logging.ERROR)  # what torchrun has to say of processes that end
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in SAID:
            print(f"error: process {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as signal:
        print("interrupted", file=sys.stderr)
        return 128 + signal.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
