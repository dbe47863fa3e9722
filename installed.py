"""Imported first by the entry scripts, for what can happen while they import all else: each is one line."""

import logging
import os
import re
import signal
import sys
from importlib.util import find_spec

missing = [name for name in ("torch", "torchvision", "timm") if find_spec(name) is None]
if missing:
    advice = "bash scripts/install.sh makes .venv with all it needs, then source .venv/bin/activate"
    print(f"error: {sys.executable} has no {', '.join(missing)}: {advice}", file=sys.stderr)
    sys.exit(2)


# Where CUDA is installed and no GPU is, it warns on import.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _interrupt(*_: object) -> None:
    """Ctrl-C before `utils.run_main` takes over; torchrun says it for its processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        os.write(2, b"interrupted\n")
    os._exit(130)


def _stop(*_: object) -> None:
    """SIGTERM and SIGUSR1 before training takes over: the same command starts again."""
    codes = re.findall(r"--requeue[-_]code[ =](\d+)", " ".join(["--requeue_code 75", *sys.argv]))
    os.write(1, b"stopped before training: the same command starts again\n" * ("RANK" not in os.environ))
    os._exit(int(codes[-1]))


PROGRAM = os.path.basename(sys.argv[0])
if PROGRAM in ("main_earlyExit.py", "eval_dynamic.py"):
    signal.signal(signal.SIGINT, _interrupt)
if PROGRAM == "main_earlyExit.py":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
