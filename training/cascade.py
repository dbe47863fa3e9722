"""A cascade (models/ebjr.py) from its networks' files of weights: `--networks
"NAME:option=value,weights=FILE" ...`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from models import model_class
from models.ebjr import Member, parse_member
from training.augment import Augment
from training.checkpoint import load
from training.flags import Flag
from training.foreign import load_network, stored_arch, stored_flags

SEEN = [
    Flag("mean", float, None, many=True),
    Flag("std", float, None, many=True),
    Flag("input_size", int, None),
    Flag("popular_classes", int, None, many=True),
]


class Part(NamedTuple):
    """A network of the cascade, its weight file and what that holds."""

    member: Member
    source: str
    content: dict[str, Any]


def read_parts(texts: Sequence[str]) -> list[Part]:
    """Loads the file that each of `texts` names and fills in what the text leaves open.

    A checkpoint of ours tells its network, normalisation, input size and popular classes; weights as
    published are normalised as their family was, unless the text says how. Raises ValueError in one line.
    """
    if len(texts) < 2:
        raise ValueError(f"--networks {' '.join(texts)}: a cascade has two or more")
    return [_read(text) for text in texts]


def _read(text: str) -> Part:
    name, _, rest = ("", "", text) if text.startswith("weights=") else text.partition(":")
    words = [word for word in rest.split(",") if word]
    sources = [word.removeprefix("weights=") for word in words if word.startswith("weights=")]
    if len(sources) != 1:
        raise ValueError(f"network {text!r}: name its file of weights, as in NAME:weights=FILE")
    content = load(sources[0])
    arch = stored_arch(content, sources[0])
    if not name and arch is None:
        raise ValueError(
            f"checkpoint {sources[0]} does not name a network known here: write NAME:weights={sources[0]}"
        )
    member = parse_member(
        f"{name or arch['name']}:{','.join(word for word in words if not word.startswith('weights='))}"
    )
    seen = stored_flags(content, SEEN, sources[0])
    stats = [seen.get("mean"), seen.get("std")]
    if None in stats and not seen:
        stats = model_class(member.name).normalisation or (None, None)
    popular = seen.get("popular_classes")
    found = {"mean": stats[0], "std": stats[1], "size": seen.get("input_size")}
    found["classes"] = [*popular, -1] if popular else None
    kept = {
        key: tuple(value) if isinstance(value, (list, tuple)) else value
        for key, value in found.items()
        if getattr(member, key) is None
    }
    return Part(member._replace(**kept), sources[0], content)


def stored_run(parts: Sequence[Part]) -> dict[str, Any]:
    """Like a checkpoint, which flags the networks were trained with and which images all of them held out."""
    runs = [part.content for part in parts if isinstance(part.content.get("args"), dict)]
    args = {
        key: value for key, value in (runs[0]["args"] if runs else {}).items() if key != "popular_classes"
    }
    held_out = [part.content.get("calib_indices") for part in parts]
    same = all(indices == held_out[0] for indices in held_out)
    return {"args": args, "calib_indices": held_out[0] if same else None}


def assemble(parts: Sequence[Part], num_classes: int, augment: Augment) -> dict[str, Any]:
    """The cascade as a checkpoint has it (`arch` and `model`), for images that `augment` makes. Raises
    ValueError."""
    weights, texts = {}, []
    for i, (member, source, content) in enumerate(parts):
        network, arch, _ = load_network(
            content,
            source,
            "auto",
            name=member.name,
            options=member.options,
            num_classes=len(member.classes or ()) or num_classes,
            input_size=member.size or augment.input_size,
        )
        weights |= {f"networks.{i}.{key}": value for key, value in network.state_dict().items()}
        texts.append(str(member._replace(options=arch["options"])))
    return {
        "model": weights,
        "arch": {"name": "ebjr", "options": {"networks": texts}, "num_classes": num_classes},
    }
