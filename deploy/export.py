"""Exports a network with its policy to a folder that runs without PyTorch."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from adaptive.confidence import EVERYBODY
from adaptive.policy import Policy, model_hash
from adaptive.reference import Reference
from deploy import manifest, runner
from deploy.drift import reference_file
from deploy.folder import Folder
from deploy.folder_readme import readme
from deploy.manifest import Architecture, Manifest, Pixels, StageFiles
from deploy.programs import check_packages, portable, program_of, save_compiled, save_onnx, save_program
from deploy.stages import Stage, named_stages
from experiment.open import Opened
from experiment.provenance import made
from experiment.record import Record
from experiment.samples import Seen
from experiment.subject import Subject
from utils import UserError, write_text, writing

FILES = {"fp32": "policy.json", "bf16": "policy.bf16.json", "int8": "policy.int8.json"}
# Writes `stageK.int8.onnx` into a folder, for the stages there in fp32 as in the manifest; returns the names.
Quantise = Callable[[Path, Sequence[Mapping[str, Any]]], Sequence[str]]


def export(
    opened: Opened,
    policies: Policy | Mapping[str, Policy],
    folder: str | Path,
    *,
    menu: Sequence[Policy] = (),
    quantise: Quantise | Path | None = None,
    compiled: bool = False,
    reference: Callable[[Policy], Reference] | None = None,
) -> Manifest:
    """Writes the network's stages, as its policies cut it, with all that runs them; returns what is there.

    `policies` are by precision, that in which they were found first; one alone is for fp32, and `shared`.
    Those of the `menu` that fit the same stages are written beside them, each with its `reference`; nothing
    is written of stages that no policy reaches. `quantise` makes the stages for int8, or is a folder that has
    them, cut at every exit; these are joined, but not under a guarantee, which holds for what was evaluated.
    `compiled` adds packages for this machine's processor. An earlier export is replaced once the new one is
    complete. Raises ValueError for policies that do not fit each other or the network, for missing packages,
    and for a folder that holds something else.
    """
    folder = Path(folder).resolve()
    check_target(folder, compiled=compiled)
    given = policies if isinstance(policies, Mapping) else shared(policies)
    off = _off(given, opened)
    swaps = [one for one in menu if set(one.off) >= set(off)]
    last = max(map(_last, [*given.values(), *swaps]))
    if isinstance(quantise, Path) and any(policy.guarantee for policy in given.values()):
        off, last = (), None
    if ("int8" in given) != (quantise is not None):
        raise UserError("int8 needs a policy and quantised stages: give both or neither")
    with replacing_folder(folder) as part:
        images = torch.rand(2, 3, *[opened.view.size] * 2)
        named = named_stages(portable(opened.network), images, off, last)
        stages = _in_int8(write_stages(named, part, compiled), part, quantise)
        names = _write_policies(given, swaps, part, reference)
        copy_runner(part)
        found = Manifest(
            network=Architecture(**opened.arch),
            class_names=opened.class_names,
            view=Pixels.of(opened.view),
            stages=tuple(stages),
            policies={precision: FILES[precision] for precision in given},
            menu=names,
            model_hash=model_hash(opened.network),
            made=replace(made(torch.device("cpu")), command=""),  # which may name folders of this machine
        )
        write_text(part / "README.md", readme(found, given))
        found = replace(found, files=_hashes(part))
        found.save(part)
    return found


def _in_int8(stages: list[StageFiles], folder: Path, quantise: Quantise | Path | None) -> list[StageFiles]:
    """The stages with their files in int8, if there are to be any."""
    if quantise is None:
        return stages
    if isinstance(quantise, Path):
        from deploy.joining import joined

        quantise = partial(joined, quantise)
    names = quantise(folder, [asdict(one) for one in stages])
    return [replace(one, int8=name) for one, name in zip(stages, names, strict=True)]


def export_policies(record: Record, subject: Subject, seen: Seen, evaluated: Path | None) -> str:
    """Exports an evaluated network with its first policy, and says so; the others are its menu.

    `evaluated` is the folder whose stages in int8 the tables are of, if they are of int8: what was found,
    and guaranteed, holds for them and no others.
    """
    exits = subject.recipe.exits
    found = export(
        replace(
            subject.opened, class_names=tuple(subject.splits.source.class_names), view=subject.splits.view
        ),
        shared(record.policies[0], exits.precision),
        exits.export,
        menu=record.policies[1:],
        quantise=evaluated,
        compiled=exits.export_compiled,
        reference=lambda policy: Reference.of_policy(policy, seen.read_by(policy)),
    )
    stages = f"{len(found.stages)} stage{'s' * (len(found.stages) > 1)}"
    return f"exported {stages} to {exits.export}; its README.md says how to run them"


def shared(policy: Policy, precision: str = "fp32") -> dict[str, Policy]:
    """Policies by precision: the policy, and its thresholds; a guarantee holds where it was made."""
    elsewhere = replace(policy, guarantee=None)
    found = policy if policy.made is None or policy.made.precision == precision else elsewhere
    return {precision: found} | {other: elsewhere for other in ("fp32", "bf16") if other != precision}


def _last(policy: Policy) -> int:
    """The last exit that any sample reaches."""
    return len(list(takewhile(lambda limit: limit > EVERYBODY, policy.thresholds[:-1])))


def copy_runner(folder: Path) -> None:
    """Copies what runs the stages; in the folder, its files are modules of no package."""
    for name in runner.FILES:
        text = Path(runner.__file__).with_name(name).read_text(encoding="utf-8")
        write_text(folder / name, text.replace("\nfrom deploy.", "\nfrom "))


def _off(policies: Mapping[str, Policy], opened: Opened) -> tuple[int, ...]:
    """The exits that all policies have switched off, which is how the network is cut."""
    for precision, policy in policies.items():
        if precision not in FILES:
            raise UserError(f"a policy for {precision!r}; accepted: {', '.join(FILES)}")
        policy.check(opened)
    off, *others = {one.off for one in policies.values()}
    if others:
        raise UserError(f"exits off: {off} and {others[0]}; a folder is cut into stages in one way")
    return off


def _write_policies(
    given: Mapping[str, Policy],
    menu: Sequence[Policy],
    folder: Path,
    reference: Callable[[Policy], Reference] | None,
) -> tuple[str, ...]:
    """Writes the policies by precision and those of the menu; returns the names of the latter's files."""
    files = {FILES[precision]: policy for precision, policy in given.items()}
    swaps = {f"policy-{i}.json": one for i, one in enumerate((x for x in menu if x not in given.values()), 2)}
    for name, policy in (files | swaps).items():
        policy.save(folder / name)
        if reference and name in (next(iter(files)), *swaps):  # in the precision in which it was found
            reference(policy).save(folder / reference_file(name))
    return tuple(swaps)


def _hashes(folder: Path) -> dict[str, str]:
    return {one.name: Folder.sha256(one) for one in sorted(folder.iterdir())}


def write_stages(stages: Sequence[Stage], folder: Path, compiled: bool = False) -> list[StageFiles]:
    """Writes every stage as ONNX, as a program, and compiled if asked."""
    rows = []
    for k, stage in enumerate(stages):
        row = StageFiles(
            stage.exit,
            tuple(stage.inputs),
            tuple(stage.outputs),
            fp32=f"stage{k}.onnx",
            pt2=f"stage{k}.pt2",
            compiled=f"stage{k}.compiled.pt2" if compiled else None,
        )
        program = program_of(stage)
        save_program(program, folder / row.pt2)
        save_onnx(program, stage, folder / row.fp32)
        if row.compiled:
            save_compiled(program, folder / row.compiled)
        rows.append(row)
    return rows


def check_target(folder: Path, *, compiled: bool = False) -> None:
    """Raises ValueError where an export would delete what is none, and for a missing package or compiler."""
    check_packages("export", ["onnx", "onnxscript"])
    if compiled and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        raise UserError("compiled stages need a C++ compiler, and none is installed")
    if not folder.exists():
        beside = next(parent for parent in folder.absolute().parents if parent.exists())
        if not (beside.is_dir() and os.access(beside, os.W_OK)):
            raise UserError(f"{folder} cannot be made: {beside} is no folder that can be written to")
        return
    accepted = "accepted: a new or empty folder, or an earlier export"
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; {accepted}")
    present = {one.name for one in folder.iterdir()} - {"__pycache__"}
    known = {manifest.FILE, *Manifest.load(folder).files} if manifest.FILE in present else set()
    if foreign := sorted(present - known):
        raise UserError(f"{folder} holds {foreign[0]}, which no export wrote; {accepted}")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which it replaces on success; on failure it is deleted."""
    part = folder.with_name(f".{folder.name}.part")
    old = folder.with_name(f".{folder.name}.old")
    with writing(folder):
        try:
            # An export may have been killed, even between the two steps below.
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            if folder.exists():
                os.replace(folder, old)
            os.replace(part, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
