"""scripts/slurm.sh starts a command by srun, and queues its job again where training has saved."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = {"SLURM_JOB_ID": "1042", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
PROGRAMS = {
    "srun": 'echo "srun $*"; shift 2; "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "scontrol $*"; fi',
    "torchrun": "",
    "python": 'echo "python $*"; env | grep ^PET_ | sort; exit "$CODE"',
}


@pytest.fixture
def job(tmp_path):
    """`job(words, CODE=..)`: exit code and lines of a job whose python exits with CODE."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(words, **environment):
        command = ["bash", "scripts/slurm.sh", *words]
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return ended.returncode, (ended.stdout + ended.stderr).splitlines()

    return run


@pytest.mark.parametrize(("code", "again"), [("75", True), ("0", False), ("2", False), ("137", False)])
def test_only_a_run_that_has_saved_queues_again(job, code, again):
    returned, lines = job(["python", "x.py"], CODE=code, **JOB)
    assert lines[:2] == ["srun --kill-on-bad-exit=0 --wait=60 python x.py", "python x.py"]
    assert ("scontrol requeue 1042" in lines) == again
    assert returned == (0 if again else int(code))


def test_a_recipe_runs_on_all_machines(job):
    words = ["bash", "scripts/train_dyn_perceiver_regnet_imagenet.sh", "out"]
    code, lines = job(words, CODE="0", DATA="x", SLURM_GPUS_ON_NODE="2", **JOB)
    assert code == 0
    assert "scripts/launch.py --nproc_per_node=2 " in lines[1] and "--global_batch 1024 " in lines[1]
    assert lines[2:] == [
        "PET_NNODES=2",
        "PET_RDZV_BACKEND=c10d",
        "PET_RDZV_ENDPOINT=n1:29542",
        "PET_RDZV_ID=1042",
        "PET_SHUTDOWN_TIMEOUT=110",
    ]
    words[1:] = ["scripts/train_msdnet_imagenet.sh", "msdnet_imagenet_step4", "out"]
    code, lines = job(words, DATA="x", SLURM_GPUS_ON_NODE="3", **JOB)
    assert code == 2 and lines[-1] == "error: GPUS=3 on 2 machines does not divide 256"


def test_outside_of_slurm_it_says_how_to_submit(job):
    assert job(["python", "x.py"]) == (2, ["error: submit it: sbatch scripts/slurm.sh COMMAND"])
