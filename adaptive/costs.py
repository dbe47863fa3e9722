"""What stages cost, hence what an image costs that leaves at an exit while others are switched off."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from models import MultiExitModel


def stages_for(model: MultiExitModel, exits: Iterable[int]) -> list[int]:
    """The stages that must run, in order, for the answers of these exits."""
    wanted = set(exits)
    return sorted(wanted.union(*(model.stages_before(k) for k in wanted)))


@dataclass(frozen=True)
class StageCosts:
    """What one image costs at every stage: `trunks` [K] and `heads` [K], in `unit`.

    `before` [K] are the stages that must have run before each; `fixed` [K] says whether the head of a stage
    must run with it, since a later stage reads its logits.
    """

    trunks: tuple[float, ...]
    heads: tuple[float, ...]
    before: tuple[tuple[int, ...], ...]
    fixed: tuple[bool, ...]
    unit: str = "multiply-adds"

    @classmethod
    def of(
        cls,
        model: MultiExitModel,
        trunks: Sequence[float],
        heads: Sequence[float],
        unit: str = "multiply-adds",
    ) -> "StageCosts":
        """The costs of a network's stages, [K] each."""
        stages = range(model.num_exits)
        before = tuple(tuple(model.stages_before(k)) for k in stages)
        return cls(tuple(trunks), tuple(heads), before, tuple(map(model.reads_logits, stages)), unit)

    def leaving(self, off: Iterable[int] = ()) -> list[float]:
        """The cost of an image that leaves at each exit, [K], with the exits in `off` switched off.

        An exit switched off costs its head, and its trunk too where no exit that is on needs it. Nobody
        leaves there; for it the cost is that of the last exit before it.
        """
        on = [k for k in range(len(self.trunks)) if k not in set(off)]
        ran: set[int] = set()
        total = 0
        costs = []
        for k in range(len(self.trunks)):
            if k in on:
                for stage in sorted({*self.before[k], k} - ran):
                    total += self.trunks[stage]
                    if stage == k or self.fixed[stage]:
                        total += self.heads[stage]
                    ran.add(stage)
            costs.append(total)
        return costs

    def alone(self) -> list[float]:
        """The cost of each exit as a static network [K]: all others are switched off."""
        exits = range(len(self.trunks))
        return [self.leaving(set(exits) - {k})[k] for k in exits]
