"""The processes of a run: how they start and join, and what they keep in common."""

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import Compute, Runtime, UserError


def start_compute(runtime: Runtime) -> Compute:
    """Joins the processes of torchrun or SLURM, if there are any, and picks device and precision.

    Raises ValueError for an unknown or absent device, and for an output folder that is a file.
    """
    device, folder = runtime.device, Path(runtime.output_dir)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--output_dir {folder}: {path} is a file; give a folder, it may be a new one")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: accepted: auto, cpu, cuda, cuda:N")
    rank, world_size, local_rank = _ranks()
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device here; accepted: auto, cpu")
    if kind == "cuda":
        kind = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    _end_with_launcher()
    if world_size > 1:
        # A moving average kept in main memory is shared over gloo.
        backend = "cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size)
    amp = runtime.amp_dtype if runtime.use_amp else "none"
    if amp == "auto":
        amp = "fp16" if kind.startswith("cuda") else "bf16" if has_bf16(kind) else "none"
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return Compute(torch.device(kind), dtype, runtime.channels_last, rank, world_size)


def has_bf16(kind: str) -> bool:
    """Whether "cpu" or another kind of device has bf16 instructions; without, bf16 is slower than fp32."""
    return kind != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _end_with_launcher() -> None:
    """Makes a process of torchrun end when torchrun is killed: it would go on, and hold the run's folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _ranks() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as torchrun or SLURM says."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            rank, world_size, local_rank = (int(os.environ[name]) for name in names)
            return rank, world_size, local_rank
    return 0, 1, 0


def wrapped(model: nn.Module, compute: Compute) -> nn.Module:
    """The model, in DistributedDataParallel where several processes train it."""
    if compute.world_size == 1:
        return model
    on_gpu = compute.device.type == "cuda"
    return DistributedDataParallel(model, device_ids=[compute.device] if on_gpu else None)


def share_buffers(module: nn.Module, compute: Compute) -> None:
    """Gives every process the buffers of the first one.

    After a step each has batch-norm statistics of its own images.
    """
    for buffer in module.buffers() if compute.world_size > 1 else ():
        dist.broadcast(buffer, 0)
