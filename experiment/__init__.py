"""What a run is and what it writes: recipes, checkpoints, networks opened from any file."""

from experiment.open import Opened, open_network

__all__ = ["Opened", "open_network"]
