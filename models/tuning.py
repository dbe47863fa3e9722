"""Alternative kernels for the same computation, chosen from outside, once, for a whole network."""

import torch
from torch import nn


class Tunable(nn.Module):
    """A module with a choice of kernels; as built it runs on every device, with the published operations."""

    def choose_kernels(self, *, on_cpu: bool, training: bool) -> None:
        """Sets which kernels `forward` uses from now on."""
        raise NotImplementedError

    def choose_portable(self) -> None:
        """Sets the operations that runtimes outside PyTorch compute alike."""
        self.choose_kernels(on_cpu=False, training=False)


def tune(network: nn.Module, device: torch.device | str) -> None:
    """Chooses the fastest kernels for `device` and the network's mode, training or evaluation."""
    on_cpu = torch.device(device).type == "cpu"
    for module in network.modules():
        if isinstance(module, Tunable):
            module.choose_kernels(on_cpu=on_cpu, training=module.training)
