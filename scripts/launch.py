"""torchrun, with restarts that work, and an end as its processes have it. It takes torchrun's flags.

    python scripts/launch.py --nproc_per_node=8 --max_restarts=3 main_earlyExit.py --output_dir DIR ...

SIGTERM, SIGUSR1 and Ctrl-C go on to the processes, which then have `--shutdown_timeout` seconds (30) to save;
a second Ctrl-C stops them at once. torchrun itself puts a report of some forty lines below the line of a
mistake, exits with 1 for all, and dies of SIGUSR1.
"""

import argparse
import logging
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import installed  # noqa: F401

# isort: split
import yaml
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, parse_min_max_nnodes
from torch.distributed.run import run as torchrun

MISTAKE = 2  # what a process exits with whose flags or files are wrong: it would be so again
SAID = (1, MISTAKE)  # what a process exits with that has said why: by a traceback, by one line
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Saved(SignalException):
    """A signal after which every process has saved and ended by itself."""


class AtOnce(SignalException):
    """The second Ctrl-C."""


class Agent(LocalElasticAgent):
    """torchrun's keeper of the processes of one machine.

    A run that ends with `requeue_code` has saved and goes on when it is started again. Processes that end
    with one of `final` are not restarted.
    """

    def __init__(self, *args: Any, requeue_code: int, final: set[int], **options: Any) -> None:
        super().__init__(*args, **options)
        self.requeue_code = requeue_code
        self.final = final

    def run(self, role: str = "default") -> RunResult:
        """Keeps the processes running; raises Saved, or SignalException, once a signal has ended them."""
        try:
            return super().run(role)
        except AtOnce:
            raise
        except SignalException as stop:
            started = self._pcontext.subprocess_handlers.values() if self._pcontext else ()
            codes = {handler.proc.returncode for handler in started}
            if codes == {0}:  # the run came to its end
                return RunResult(WorkerState.SUCCEEDED)
            saved = self.requeue_code in codes and codes <= {0, self.requeue_code}
            if saved or not (codes or stop.sigval == signal.SIGINT):  # or none had been started yet
                raise Saved(str(stop), stop.sigval) from stop
            raise

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Gives the processes of every start a store of their own.

        torch keeps the first one, where they would find the addresses of those that have died ("Connection
        refused"), on a machine that may be gone.
        """
        self._pcontext = None
        handler: Any = worker_group.spec.rdzv_handler
        handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            first = min(result.failures.values(), key=lambda failure: failure.timestamp)
            if first.exitcode in self.final:
                self._remaining_restarts = 0
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Passes the signal on and waits; torch would wait 30 s where it restarts, whatever the flag says."""
        if death_sig == signal.SIGHUP:  # training saves upon the others
            death_sig = signal.SIGTERM
        patience = getattr(self, "_shutdown_timeout", None)  # an older torch has 30 s
        try:
            super()._shutdown(death_sig, *([patience] if patience else []))
        except AtOnce:
            super()._shutdown(signal.SIGKILL)
            raise


def _stop(number: int, frame: FrameType | None) -> None:
    """The first signal stops the processes; after it only Ctrl-C is heard."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGINT, _stop_at_once)
    raise SignalException("stop", signal.Signals(number))


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise AtOnce("stop at once", signal.Signals(number))


def _flags_of_program(words: list[str]) -> argparse.Namespace:
    """The flags of the program that also matter here, those of its `--recipe` file too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default="")
    parser.add_argument("--requeue_code", "--requeue-code", type=int, default=75)
    parser.add_argument("--recipe")
    flags = parser.parse_known_args(words)[0]
    if flags.recipe:
        with suppress(OSError, ValueError, yaml.YAMLError):  # which the program says
            content = yaml.safe_load(Path(flags.recipe).read_text(encoding="utf-8"))
            found = [
                f"--{name}={content[name]}" for name in ("output_dir", "requeue_code") if name in content
            ]
            flags = parser.parse_known_args([*found, *words])[0]
    return flags


def _refusal(args: argparse.Namespace, output_dir: str) -> str:
    """Why runs cannot be restarted as these flags say, or ""."""
    if not args.max_restarts:
        return ""
    if not output_dir:
        return "give the program --output_dir too: without it every restart trains anew in a new folder"
    placed = args.rdzv_endpoint or args.master_port != parse_args(["program"]).master_port
    alone = parse_min_max_nnodes(args.nnodes)[1] == 1 and not placed
    if args.rdzv_backend == "static" and not args.standalone and not alone:
        return "processes find each other again with --rdzv_backend c10d --rdzv_endpoint HOST:PORT only"
    return ""


def main(argv: list[str]) -> int:
    """Runs torchrun; returns the exit code of the process that failed first, or 0."""
    args = parse_args(argv)
    flags = _flags_of_program(args.training_script_args)
    refusal = _refusal(args, flags.output_dir)
    if refusal:
        print(f"error: --max_restarts {args.max_restarts}: {refusal}", file=sys.stderr)
        return MISTAKE
    logging.disable(logging.ERROR)  # what torchrun has to say of processes that end
    fewest, most = parse_min_max_nnodes(args.nnodes)
    # Where one machine may leave, the others go on.
    final = {MISTAKE} if fewest < most else {MISTAKE, flags.requeue_code}
    api.LocalElasticAgent = partial(Agent, requeue_code=flags.requeue_code, final=final)
    args.signals_to_handle = ""  # by torchrun; they are handled here
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(each, _stop)
    try:
        torchrun(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (*SAID, flags.requeue_code):
            print(f"error: process {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except Saved:
        return flags.requeue_code
    except SignalException as stop:
        print("interrupted", file=sys.stderr)
        return 128 + stop.sigval
    except RendezvousError as error:
        where = f"the machines have no connection at --rdzv_endpoint {args.rdzv_endpoint}"
        print(f"error: {where} ({type(error).__name__}); start them all again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
