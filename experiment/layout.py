"""The layout of record.json as far as tables and plots read it: types, and what the figures may be."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from experiment.portable import paths_in

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
# Names stand in Markdown tables: no bar, no backtick, no new line.
Name = Annotated[str, Field(max_length=100, pattern=r"^[\w./:+@-]+$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
SHOWN = 60  # characters of a wrong value


class Part(BaseModel):
    """A table of a file; what it holds beside the fields is not read."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class About(Part):
    """What was evaluated."""

    network: Name
    options: dict[str, Any]
    data_set: Name
    num_test: Count
    input_size: Count
    confidence: Name


class Made(Part):
    """By what: the commit is empty without git, and ends in " with changes" for files that differ."""

    commit: Annotated[str, Field(pattern=r"^([0-9a-f]{7,40}( with changes)?)?$")]
    machine: Text


class Training(Part):
    """The flags of a training that are read one by one."""

    seed: int = 0
    regime: Name | None = None
    epochs: Count | None = None
    epoch_images: Count | None = None
    members: list["Training"] = []


class Origin(Part):
    """Where the figures come from; by SHA-256 the weights, the test images' labels and the data's files."""

    made: Made
    model: Hash
    test: Hash
    files: dict[str, Hash]
    training: Training


class Exit(Part):
    """An exit that all images leave at."""

    macs: Positive
    acc1: Fraction


class Accuracy(Part):
    """An estimate; its interval is not read."""

    value: Fraction


class Found(Part):
    """A policy, with its accuracy on the images that it was found on."""

    accuracy: Fraction


class FrontRow(Part):
    """A policy that a search found."""

    policy: Found
    macs: Positive
    accuracy: Accuracy


class QuotaRow(Part):
    """A policy of the quota rule."""

    macs: Positive
    accuracy: Fraction


class Timed(Part):
    """A way to answer that was timed; latency at batch 1 where it was."""

    policy: Text
    images_per_s: Positive
    p50_ms: Positive | None
    macs: Positive
    accuracy: Fraction


class Gain(Part):
    """How many times the images/s of the last exit alone a chosen policy has, with its 95 % interval."""

    point: Text
    speedup: Positive
    speedup_interval: Annotated[list[Positive], Field(min_length=2, max_length=2)]


class Runtime(Part):
    """What was timed, on so many test images."""

    num_images: Count
    table: list[Timed]
    points: list[Gain] = []


class Cost(Part):
    """An estimate; its interval is not read."""

    value: Positive


class Chosen(Part):
    """A chosen policy on all test images."""

    name: Text
    accuracy: Accuracy
    macs: Cost


def ascending(exits: list[Exit]) -> list[Exit]:
    """The exits as they are. Raises ValueError where a later one costs no more."""
    costs = [one.macs for one in exits]
    if costs != sorted(set(costs)):
        raise ValueError("a later exit must cost more than an earlier one")
    return exits


class RecordFile(Part):
    """What record.json must hold to be read as a result."""

    layout: Literal[2] = Field(alias="schema")  # that of experiment.record
    provenance: About
    origin: Origin
    anytime: Annotated[list[Exit], Field(min_length=1), AfterValidator(ascending)]
    dynamic: list[QuotaRow] = []
    front: list[FrontRow] = []
    headline: Chosen | None = None
    headlines: list[Chosen] = []
    runtime: Runtime | None = None


FilePart = TypeVar("FilePart", bound=Part)


def checked(layout: type[FilePart], content: Any) -> FilePart:
    """Content in a layout. Raises ValueError in one line that names the first wrong field and its value."""
    try:
        return layout.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the whole"
    value = repr(first["input"])
    if first["type"] == "missing":
        raise ValueError(f"it has no {place}")
    short = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}, not {short}")


def read_record(content: Any) -> RecordFile:
    """The content of record.json. Raises ValueError for what is none, and for paths of a machine."""
    record = checked(RecordFile, content)
    for place, path in paths_in(content):
        raise ValueError(f"{place}: {path} is a path of a machine; a record has the last name alone")
    return record
