"""What a policy does with every test image, as a table: samples.csv."""

import csv
import os
from pathlib import Path

from torch import Tensor

from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from datasets import Split, Stream
from utils import replacing

COLUMNS = "index", "file", "label", "exit", "answer", "confidence"


def write_samples(
    path: Path,
    images: Split | Stream,
    indices: Tensor,
    tables: ExitTables,
    policy: Policy,
    folder: str | Path = "",
) -> None:
    """Writes a row per image of tables, in their order, with `COLUMNS`; label and answer are classes.

    `indices` [N] say which of the test images each one is (`experiment.samples.reported`): they become the
    index in the data set, or in a stream, which has none, the place in the order read. A file is given as its
    path below `folder`, with the bytes of its name, whatever their encoding; an image of an array has none.
    """
    met, places = policy.outcome(tables), indices.tolist()
    files = [""] * len(places)
    if not isinstance(images, Stream):
        above = os.path.join(Path(folder), "")
        files = [images.file(place).removeprefix(above) for place in places]
        places = [images.indices[place] for place in places]
    numbers = (tables.targets, met.exits, met.answers, met.confidence)
    rows = zip(places, files, *(column.tolist() for column in numbers), strict=True)
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with replacing(path) as temporary, open(temporary, "w", **text) as file:
        file.write(",".join(COLUMNS) + "\n")
        # Names are quoted always: not every version quotes one for a carriage return in it.
        csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
