"""Runs an exported network with real early exit, without PyTorch: NumPy and openvino or onnxruntime.

python runner.py FOLDER images/*.jpg --json

answers = Runner("FOLDER").answer(["cat.jpg", "dog.jpg"])  # or an array [N, 3, H, W]
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.decide import MEMORY, Array, RunnerError, State, only
from deploy.folder import IMAGES, Folder, read_later
from deploy.pictures import check_file, prepared
from deploy.runtimes import BACKENDS, runtime, size_for

FILES = "runner.py", "decide.py", "folder.py", "pictures.py", "runtimes.py"  # what an exported folder holds
ORDERS = "latency", "throughput"
WINDOW = 16  # micro-batches of files whose answers are printed together


class Answers(NamedTuple):
    """Numbers of the samples [N], logits [N, C], exits [N] where they left, classes and confidence there.

    By a policy with `"answer": "mean"`, the logits are logarithms of mean probabilities.
    """

    ids: Array
    logits: Array
    exits: Array
    classes: Array
    confidence: Array


class Pool:
    """Rows that wait for a stage, in buffers that the stage reads as they are; the last come first."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.fill = 0
        self.buffers: State = {}
        self.views: dict[tuple[int, int], State] = {}

    def put(self, state: State, rows: Array) -> None:
        """Copies these rows of every tensor; rows in a row at once."""
        start = self.fill
        end = start + len(rows)
        first, last = rows[0], rows[-1]
        whole = last - first + 1 == len(rows)
        for name, array in state.items():
            if name not in self.buffers:
                self.buffers[name] = np.zeros((self.room, *array.shape[1:]), array.dtype)
                self.views = {}
            into = self.buffers[name][start:end]
            if whole:
                into[:] = array[first : last + 1]
            else:
                array.take(rows, 0, into, "clip")  # which writes there at once; the rows exist
        self.fill = end

    def take(self, most: int) -> tuple[State, int]:
        """Takes out the last rows; how many they are. More may follow, up to a common size of batch."""
        count = min(self.fill, most)
        self.fill -= count
        size = min(size_for(count), most)
        return self.rows(self.fill, size), count

    def rows(self, start: int, size: int) -> State:
        """Rows from `start` on: the same arrays each time, as a stage has them bound."""
        key = start, size
        if key not in self.views:
            self.views[key] = {name: buffer[start : start + size] for name, buffer in self.buffers.items()}
        return self.views[key]


class Runner:
    """The stages, preprocessing and policy of an exported folder; for one caller at a time.

    `backend` is openvino, onnxruntime, or auto: the first that is installed. `precision` is one that the
    folder has a policy for, `threads` 0 for one per processor that the process may use. The policy in another
    file takes the place of the folder's if it is for the same exits. Runners share nothing. Raises
    RunnerError for a folder that is not as it was exported.
    """

    def __init__(
        self,
        folder: str | Path,
        backend: str = "auto",
        precision: str = "fp32",
        *,
        micro_batch: int = 64,
        threads: int = 0,
        policy: str | Path | None = None,
    ) -> None:
        for what, value, least in (("micro_batch", micro_batch, 1), ("threads", threads, 0)):
            if value < least:
                raise RunnerError(f"{what} is {value}; accepted: {least} and more")
        self.folder = Folder(Path(folder), precision, policy)
        self.policy = self.folder.policy
        self.view = self.folder.view
        self.class_names = self.folder.class_names
        files = self.folder.stages
        engine = runtime(backend, precision, threads)
        self.stages = [engine.stage(one, len(self.class_names)) for one in files]
        self.exits = [one.exit for one in files]
        self.later = read_later(files)
        self.micro_batch = micro_batch
        self.pools = [Pool(2 * micro_batch) for _ in files]

    def answer(self, images: Array | Sequence[Any], order: str = "latency") -> Answers:
        """What the network says of image files or PIL images, or of an array [N, 3, H, W] as prepared.

        "latency" takes a micro-batch through all stages and drops what leaves; "throughput" gives every stage
        full micro-batches of what is left of many. Files are read a micro-batch at a time.
        """
        if order not in ORDERS or not len(images):
            accepted = " or ".join(ORDERS)
            raise RunnerError(f"{len(images)} images in order {order!r}; accepted: 1 and more, {accepted}")
        if isinstance(images, np.ndarray):
            images = self._checked(images)
        for pool in self.pools:
            pool.fill = 0
        parts = []
        for start in range(0, len(images), self.micro_batch):
            batch = images[start : start + self.micro_batch]
            if not isinstance(batch, np.ndarray):
                batch = np.stack([self.prepare(one) for one in batch])
            rows = np.arange(len(batch))
            self.pools[0].put({IMAGES: batch, "ids": start + rows}, rows)
            parts += self._advance(self.micro_batch if order == "throughput" else 1)
        parts += self._advance(1)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        back = columns[0].argsort()
        return Answers(*(column[back] for column in columns))

    def _checked(self, images: Array) -> Array:
        side = self.view["size"]
        if images.shape[1:] != (3, side, side) or images.dtype.kind != "f":
            given = f"an array {list(images.shape)} of {images.dtype}"
            raise RunnerError(f"{given}; accepted: [N, 3, {side}, {side}] of float32")
        return images.astype(np.float32, copy=False)

    def _advance(self, least: int) -> list[Answers]:
        """Runs stages until fewer than `least` samples wait before each."""
        parts: list[Answers] = []
        for k, pool in enumerate(self.pools):
            while pool.fill >= least:
                self._run(k, parts)
        return parts

    def _run(self, k: int, parts: list[Answers]) -> None:
        """Runs a stage, then the next if a micro-batch waits there: no pool ever holds two."""
        answers, state, stay = self.step(k, *self.pools[k].take(self.micro_batch))
        if len(answers.ids):
            parts.append(answers)
        if len(stay):
            following = self.pools[k + 1]
            following.put(state, stay)
            if following.fill >= self.micro_batch:
                self._run(k + 1, parts)

    def step(self, k: int, state: State, count: int) -> tuple[Answers, State, Array]:
        """Runs a stage on rows of which the first `count` are samples: what leaves, the state, who stays."""
        logits, made = self.stages[k](state)
        ids = state["ids"]
        remembered = only(state, MEMORY) if self.policy.remembers else {}
        known = {name: array[:count] for name, array in remembered.items()}
        answers, score, leaves, memory = self.policy.decide(self.exits[k], logits[:count], known)
        (gone,) = leaves.nonzero()
        (stay,) = (~leaves).nonzero()
        left = answers[gone]
        exits = np.full(len(gone), self.exits[k])
        found = Answers(ids[gone], left, exits, left.argmax(-1), score[gone])
        kept = only(state, self.later[k])
        return found, {**kept, **made, **memory, "ids": ids}, stay

    def prepare(self, image: Any) -> Array:
        """A PIL image, or the file of one, as the network reads it: float32 [3, H, W]."""
        return prepared(image, self.view)


def rows_of(runner: Runner, files: Sequence[str], order: str) -> Iterator[dict[str, Any]]:
    """The answer for every file in order, a window at a time; RunnerError before if one is no image."""
    for file in files:
        check_file(file)
    size = WINDOW * runner.micro_batch
    for start in range(0, len(files), size):
        window = files[start : start + size]
        answers = runner.answer(window, order)
        columns = [column.tolist() for column in (answers.exits, answers.classes, answers.confidence)]
        for file, exit, label, score in zip(window, *columns, strict=True):
            name = runner.class_names[label]
            yield {"image": file, "class": name, "exit": exit, "confidence": round(score, 4)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Classifies images with an exported network.")
    parser.add_argument("folder")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--policy", help="the policy of another file for this network")
    parser.add_argument("--order", default="throughput", choices=ORDERS)
    parser.add_argument("--micro_batch", type=int, default=64, help="images in one call of a stage")
    parser.add_argument("--threads", type=int, default=0, help="0: one per processor")
    parser.add_argument("--json", action="store_true", help="a JSON object per line")
    given = parser.parse_args()
    try:
        runner = Runner(
            given.folder,
            given.backend,
            given.precision,
            micro_batch=given.micro_batch,
            threads=given.threads,
            policy=given.policy,
        )
        for row in rows_of(runner, given.images, given.order):
            line = "{image}: {class} (exit {exit}, {confidence})".format(**row)
            print(json.dumps(row) if given.json else line)
    except (RunnerError, ModuleNotFoundError) as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
