"""What saving costs is measured on a run that really saves."""

import re

import torch


def test_a_row_for_every_part_of_a_save(printed, tmp_path):
    words = "--model msdnet --nBlocks 2 --nChannels 4 --growthRate 4 --batch_size 2 --rounds 1"
    text = printed("bench_checkpoint", *words.split(), "--folder", tmp_path)
    rows = dict(re.findall(r"^([a-z ]*[a-z])  +([\d.]+) +[\d.]+$", text, re.MULTILINE))
    assert list(rows) == ["step", "copy", "wait", "on the spot", "writing", "while writing"]
    assert all(float(ms) > 0 for ms in rows.values()) and "x the checkpoint" in text
    state = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert {"model", "model_ema", "optimizer"} <= state.keys() and not (tmp_path / "warm.pth").exists()
