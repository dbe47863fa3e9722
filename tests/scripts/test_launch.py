"""torchrun ends as its processes do, starts them again where that helps, and passes signals on."""

import importlib
import logging
import os
import signal
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError
from torch.distributed.launcher import api

SAVED = 75


@pytest.fixture
def launch(monkeypatch):
    """The script, with signals, torch's agent and its log as they were afterwards."""
    module = importlib.import_module("launch")
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(api, "LocalElasticAgent", LocalElasticAgent)
    before = {each: signal.getsignal(each) for each in module.SIGNALS}
    yield module
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def ended(launch, monkeypatch, capsys):
    """`ended(error, *words)`: the exit code and what is on stderr if torchrun raises this."""

    def run(error, *words, program=()):
        def torchrun(args):
            assert (args.nproc_per_node, args.training_script) == ("2", "x.py")
            if error:
                raise error

        monkeypatch.setattr(launch, "torchrun", torchrun)
        return launch.main(["--nproc_per_node", "2", *words, "x.py", *program]), capsys.readouterr().err

    return run


@pytest.fixture
def agent(launch, monkeypatch):
    """`agent(final)`: an agent with three restarts left, without processes."""
    monkeypatch.setattr(LocalElasticAgent, "__init__", lambda self: None)

    def make(final=frozenset()):
        made = launch.Agent(requeue_code=SAVED, final=set(final))
        made._remaining_restarts, made._shutdown_timeout, made._pcontext = 3, 60, None
        return made

    return make


def failure(code):
    return ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="<N/A>")


def failed(code):
    return ChildFailedError("x.py", {1: failure(code)})


def test_a_failure_that_was_said_is_not_said_again(ended):
    assert ended(None) == (0, "")
    assert ended(failed(2)) == (2, "")
    assert ended(failed(1)) == (1, "")
    assert ended(failed(SAVED)) == (SAVED, "")
    assert ended(failed(76), program=["--requeue-code=76"]) == (76, "")


def test_a_process_that_could_not_speak_is_spoken_for(ended):
    assert ended(failed(-9)) == (137, "error: process 1 ended with exit code -9\n")
    assert ended(SignalException("Ctrl-C", sigval=signal.SIGINT)) == (130, "interrupted\n")


def test_machines_that_lost_each_other_are_told_so(ended):
    line = (
        "the machines have no connection at --rdzv_endpoint a:1 (RendezvousClosedError); start them all again"
    )
    words = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "a:1"]
    assert ended(RendezvousClosedError("closed"), *words) == (1, f"error: {line}\n")


@pytest.mark.parametrize(
    ("words", "program", "line"),
    [
        ([], [], "give the program --output_dir too: without it every restart trains anew in a new folder"),
        (
            ["--nnodes", "2", "--master_addr", "a"],
            ["--output_dir=x"],
            "processes find each other again with --rdzv_backend c10d --rdzv_endpoint HOST:PORT only",
        ),
    ],
)
def test_restarts_that_could_not_go_on_are_refused(ended, words, program, line):
    said = f"error: --max_restarts 3: {line}\n"
    assert ended(None, "--max_restarts", "3", *words, program=program) == (2, said)
    assert ended(None, *words, program=program) == (0, "")


@pytest.mark.parametrize(
    ("words", "final"), [([], {2, SAVED}), (["--nnodes", "1:2", "--rdzv_backend", "c10d"], {2})]
)
def test_what_is_not_restarted(ended, words, final):
    assert ended(None, "--max_restarts", "3", *words, program=["--output-dir", "x"]) == (0, "")
    assert api.LocalElasticAgent.keywords == {"requeue_code": SAVED, "final": final}


@pytest.mark.parametrize(("code", "left"), [(2, 0), (SAVED, 0), (1, 3), (-9, 3)])
def test_an_end_that_would_come_again_is_final(agent, monkeypatch, code, left):
    failures = {1: failure(code), 0: failure(SAVED)}  # the others are stopped for the first one
    result = RunResult(state=WorkerState.FAILED, failures=failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: result)
    made = agent({2, SAVED})
    assert made._monitor_workers(None) is result
    assert made._remaining_restarts == left


def test_each_start_has_a_store_of_its_own(agent, monkeypatch):
    monkeypatch.setattr(LocalElasticAgent, "_rendezvous", lambda self, group: None)
    handler = SimpleNamespace(_bootstrap_store_info="old", _shared_tcp_store_server="old")
    agent()._rendezvous(SimpleNamespace(spec=SimpleNamespace(rdzv_handler=handler)))
    assert vars(handler) == {"_bootstrap_store_info": None, "_shared_tcp_store_server": None}


@pytest.fixture
def stopped(agent, monkeypatch):
    """`stopped(codes)`: what an agent answers to a signal after which its processes end with these codes."""

    def run(codes):
        def stop(self, role):
            raise SignalException("stop", signal.SIGTERM)

        monkeypatch.setattr(LocalElasticAgent, "run", stop)
        made = agent()
        processes = [SimpleNamespace(proc=SimpleNamespace(returncode=code)) for code in codes]
        made._pcontext = SimpleNamespace(subprocess_handlers=dict(enumerate(processes)))
        return made.run()

    return run


@pytest.mark.parametrize(
    ("codes", "kind"), [((SAVED, SAVED), "Saved"), ((SAVED, 0), "Saved"), ((SAVED, -9), "SignalException")]
)
def test_processes_that_end_by_themselves_have_saved(stopped, codes, kind):
    with pytest.raises(SignalException) as error:
        stopped(codes)
    assert type(error.value).__name__ == kind and error.value.sigval == signal.SIGTERM


def test_a_signal_at_the_end_of_a_run_is_late(stopped):
    assert not stopped((0, 0)).is_failed()


def test_one_signal_is_passed_on_and_a_second_ctrl_c_kills(launch, agent, ended, monkeypatch):
    assert ended(None) == (0, "")  # the handlers are there now
    with pytest.raises(SignalException) as error:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert error.value.sigval == signal.SIGUSR1
    os.kill(os.getpid(), signal.SIGTERM)  # not heard any more
    sent = []

    def shutdown(self, death_sig, *timeout):
        sent.append((death_sig, *timeout))
        if len(sent) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LocalElasticAgent, "_shutdown", shutdown)
    with pytest.raises(launch.AtOnce):
        agent()._shutdown(signal.SIGUSR1, 30)
    assert sent == [(signal.SIGUSR1, 60), (signal.SIGKILL,)]
