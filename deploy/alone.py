"""An exit of a network as a static network: the rival of early exit, exported and run as that is."""

from torch import Tensor

from adaptive.pipeline import stages_of
from models import MultiExitModel
from models.bases import SingleExit


class Alone(SingleExit):
    """Exit k of a network in evaluation mode: no other head, and nothing that only later exits read."""

    def __init__(self, network: MultiExitModel, k: int) -> None:
        super().__init__()
        self.network = network
        self.off = set(range(network.num_exits)) - {k}
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        """The whole network: logits [B, C]."""
        return stages_of(self.network, self.off)[0](images)[0]

    def classify(self, features: Tensor) -> Tensor:
        """The logits already."""
        return features
