import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from training import parallel
from training.parallel import has_bf16, start_compute
from utils import Compute, Runtime, gather

CPU = Compute(torch.device("cpu"))
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@pytest.fixture
def alone(monkeypatch):
    """No launcher's variables, and process groups are noted down instead of joined."""
    joined = []
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **where: joined.append((backend, where)))
    return joined


def test_one_process_picks_a_device(alone):
    compute = start_compute(Runtime(device="auto", channels_last=True))
    assert compute.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert start_compute(Runtime(device="cpu", channels_last=True)) == Compute(
        torch.device("cpu"), None, True, 0, 1
    )
    assert alone == []
    assert gather({"a": 1}, CPU) == [{"a": 1}]


@pytest.mark.parametrize(
    ("amp", "kind"),
    [("none", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_mixed_precision_types_on_cpu(alone, amp, kind):
    runtime = Runtime(device="cpu") if amp == "none" else Runtime(device="cpu", use_amp=True, amp_dtype=amp)
    compute = start_compute(runtime)
    assert compute.amp is kind
    with compute.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (kind or torch.float32)


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.bfloat16), (False, None)])
def test_mixed_precision_by_itself_is_bf16_on_a_cpu_that_has_it(alone, monkeypatch, fast, kind):
    monkeypatch.setattr(parallel, "has_bf16", lambda kind: fast)
    assert start_compute(Runtime(device="cpu", use_amp=True)).amp is kind


def test_a_gpu_and_a_cpu_with_its_instructions_have_bf16(monkeypatch):
    assert has_bf16("cuda")
    assert has_bf16("cpu") == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_bf16("cpu")


def test_absent_and_unknown_devices_are_refused(alone):
    with pytest.raises(ValueError, match="^--device gpu: accepted: auto, cpu, cuda, cuda:N$"):
        start_compute(Runtime(device="gpu"))
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(
            ValueError, match=f"^--device {device}: no CUDA device here; accepted: auto, cpu$"
        ):
            start_compute(Runtime(device=device))


@pytest.mark.parametrize("names", [LAUNCHERS[:3], LAUNCHERS[3:]])
def test_launchers_variables_are_read(alone, monkeypatch, names):
    for name, value in zip(names, ("1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    compute = start_compute(Runtime(device="cpu"))
    assert (compute.rank, compute.world_size) == (1, 2)
    assert alone == [("gloo", {"rank": 1, "world_size": 2})]


def test_a_launcher_of_one_process_joins_nothing(alone, monkeypatch):
    for name, value in zip(LAUNCHERS[3:], ("0", "1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    assert start_compute(Runtime(device="cpu")) == CPU and alone == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone can do it")
def test_a_process_ends_with_its_launcher(alone, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    seen, alive = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            start_compute(Runtime(device="cpu"))
            os.write(alive, b"x")
            time.sleep(60)
        time.sleep(60)
    os.close(alive)
    assert os.read(seen, 1) == b"x"
    os.kill(launcher, signal.SIGKILL)
    assert os.read(seen, 1) == b""  # nobody is left to write
    os.waitpid(launcher, 0)
