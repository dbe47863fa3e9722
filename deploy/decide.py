"""Where samples leave an exported network, in NumPy: what `adaptive/policy.py` decides, without PyTorch."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Array = np.ndarray
State = dict[str, Array]  # named tensors, a row per sample
SCHEMAS = 1, 2  # of policies
NOBODY, EVERYBODY = 1e8, -1e8  # thresholds at which nobody, and everybody, leaves
ANSWERS = "exit", "best", "mean"
MEMORY = "sum", "predicted", "streak", "answers", "highest"  # what a policy remembers, in a state
WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a finite number"}


class RunnerError(ValueError):
    """Something is wrong with a folder, an image or a request; one line says what."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


def read_json(path: Path) -> Any:
    """The content of a JSON file; RunnerError if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunnerError(f"{path} is no JSON: {error}") from None


class Entries:
    """An object of JSON, of which nothing is believed; RunnerError, which says where, for what is not fit."""

    def __init__(self, content: Any, where: str, mark: str = ".") -> None:
        self.content: dict[str, Any] = typed(content, dict, where)
        self.where = where
        self.start = where + mark

    @classmethod
    def of(cls, path: Path, schemas: Collection[int]) -> "Entries":
        """Those of a file of one of these schemas."""
        found = cls(read_json(path), f"{path}", ": ")
        if (schema := found.content.get("schema")) not in schemas:
            accepted = " and ".join(map(str, schemas))
            raise RunnerError(f"{path}: schema {shortened(schema)}; accepted: {accepted}")
        return found

    def one(self, name: str, kind: type, default: Any = None) -> Any:
        """The entry of this name, of a type of `WORDS`."""
        return typed(self.content.get(name, default), kind, self.start + name)

    def several(self, name: str, kind: type, default: Any = None) -> list[Any]:
        """The entries of a list."""
        values = self.one(name, list, default)
        return [typed(one, kind, f"{self.start}{name}[{i}]") for i, one in enumerate(values)]

    def objects(self, name: str) -> "list[Entries]":
        """The objects of a list."""
        values = self.one(name, list)
        return [Entries(one, f"{self.start}{name}[{i}]") for i, one in enumerate(values)]


def typed(value: Any, kind: type, where: str) -> Any:
    """A value of JSON of this type, one of `WORDS`; RunnerError, which says where it is, for others."""
    fits = type(value) is kind
    if kind is float:
        fits = type(value) in (int, float) and abs(value) <= 1e300  # which no NaN is
    elif kind is int:
        fits = fits and abs(value) < 2**31
    elif kind is str:
        fits = fits and not any("\ud800" <= letter <= "\udfff" for letter in value)  # halves of characters
    if not fits:
        raise RunnerError(f"{where} is {shortened(value)}; accepted: {WORDS[kind]}")
    return kind(value)


def only(state: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """The tensors of a state that have one of these names."""
    return {name: tensor for name, tensor in state.items() if name in names}


def softmax(logits: Array) -> Array:
    """Probabilities [B, C]."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def max_prob(logits: Array, _: float) -> Array:
    """The largest probability [B]."""
    return 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)


def margin(logits: Array, _: float) -> Array:
    """The largest probability less the second largest, [B]."""
    second, first = np.partition(softmax(logits), -2)[:, -2:].T
    return first - second


def entropy(logits: Array, _: float) -> Array:
    """Sum of p log p of the probabilities, in nats, [B]."""
    p = softmax(logits)
    logs = np.log(np.maximum(p, np.finfo(p.dtype).tiny))
    return (p * logs).sum(-1)


def energy_logits(logits: Array, temperature: float) -> Array:
    """T log sum exp(x / T) of logits x, in float64, [B]."""
    scaled = logits.astype(np.float64) / temperature
    top = scaled.max(-1)
    top = np.where(np.isinf(top), 0, top)
    total = np.exp(scaled - top[:, None]).sum(-1)
    return temperature * (top + np.log(total))


def energy_softmax(logits: Array, temperature: float) -> Array:
    """The same of probabilities, [B]."""
    return energy_logits(softmax(logits.astype(np.float64)), temperature)


# Confidence [B] of logits [B, C] and a temperature, as in `adaptive/confidence.py`.
CONFIDENCES: dict[str, Callable[[Array, float], Array]] = {
    "max_prob": max_prob,
    "margin": margin,
    "entropy": entropy,
    "energy_logits": energy_logits,
    "energy_softmax": energy_softmax,
}


class Policy:
    """Decides where samples leave, as `adaptive/policy.py` does; read from the file that it writes.

    Raises RunnerError for a file that it does not write.
    """

    def __init__(self, path: Path) -> None:
        said = Entries.of(path, SCHEMAS)
        self.path = path
        self.thresholds: list[float] = said.several("thresholds", float)
        self.temperatures: list[float] = said.several("temperatures", float, [])
        self.off: list[int] = said.several("off", int, [])
        self.answer: str = said.one("answer", str, "exit")
        self.confidence: str = said.one("confidence", str, "max_prob")
        self.model_hash: str = said.one("model_hash", str, "")
        self.kind, colon, scale = self.confidence.partition(":")
        try:
            self.scale = float(scale) if colon else 1.0
        except ValueError:
            self.scale = math.nan
        self.remembers = self.kind == "agreement" or self.answer != "exit"
        if wrong := self._wrong(bool(colon)):
            raise RunnerError(f"{path} is no policy that can be read: {wrong}")

    def _wrong(self, scaled: bool) -> str:
        """What is wrong with what it says, if anything."""
        if not self.thresholds:
            return "no thresholds"
        known = self.kind in (*CONFIDENCES, "agreement")
        fits = 0 < self.scale < math.inf and (not scaled or self.kind.startswith("energy"))
        if not (known and fits):
            return f"confidence {shortened(self.confidence)}"
        if self.answer not in ANSWERS:
            return f"answer {shortened(self.answer)}"
        if self.kind == "agreement" and self.answer == "best":
            return "agreement does not say which answer is the best"
        complete = len(self.temperatures) in (0, len(self.thresholds))
        if not complete or min(self.temperatures, default=1) <= 0:
            return f"temperatures {self.temperatures}"
        closed = [k for k, limit in enumerate(self.thresholds[:-1]) if limit == NOBODY]
        if not set(self.off) <= set(closed) or (self.off and self.remembers):
            return f"off {self.off}"
        return ""

    @np.errstate(all="ignore")  # logits may be infinite
    def decide(self, k: int, logits: Array, state: State) -> tuple[Array, Array, Array, State]:
        """Of logits [B, C] at exit k: answers as logits, confidence [B], who leaves, what to remember.

        What was remembered at the exits before is in `state`, beside other tensors.
        """
        memory: State = {}
        if self.temperatures:
            logits = logits / np.float32(self.temperatures[k])
        if self.answer == "mean":
            total = softmax(logits) + state.get("sum", 0)
            memory["sum"] = total
            logits = np.log(np.maximum(total / (k + 1), np.finfo(np.float32).tiny))
        if self.kind == "agreement":
            predicted = logits.argmax(-1)
            longer = state.get("streak", 0) + 1
            streak = np.where(state.get("predicted") == predicted, longer, 1)
            memory |= {"predicted": predicted, "streak": streak}
            score = streak.astype(np.float32)
        else:
            score = CONFIDENCES[self.kind](logits, self.scale)
        if self.answer == "best":
            highest = state.get("highest", np.float32(-np.inf))
            earlier = highest > score
            logits = np.where(earlier[:, None], state.get("answers", logits), logits)
            score = np.where(earlier, highest, score)
            memory |= {"answers": logits, "highest": score}
        last = k == len(self.thresholds) - 1
        leaves = last | (score >= score.dtype.type(self.thresholds[k]))
        return logits, score, leaves, memory
