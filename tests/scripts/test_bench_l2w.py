"""The benchmark of learned sample weights prints a row per variant."""

import subprocess
from types import SimpleNamespace

import pytest

WORDS = ["--model", "cifar_resnet", "--batch_size", "4", "--rounds", "1"]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


def test_a_row_for_every_variant(printed, script, monkeypatch):
    asked = []

    def measured(command, **options):
        asked.append(command[-1])
        return SimpleNamespace(stdout="1.5\n")

    monkeypatch.setattr(subprocess, "run", measured)  # each variant's memory is that of a process of its own
    text = printed("bench_l2w", *WORDS)
    assert "floor of learning weights exactly: 3.33 plain steps" in text
    assert tuple(asked) == script("bench_l2w").VARIANTS
    assert all(f"\n{variant:20} " in text for variant in asked)
    assert "with --meta_interval 100" in text


def test_the_memory_of_a_variant_is_measured(printed):
    assert float(printed("bench_l2w", *WORDS, "--memory_of", "ours")) >= 0
