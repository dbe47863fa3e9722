"""The README of an exported folder."""

from collections.abc import Mapping
from pathlib import Path
from string import Template

from adaptive.policy import Policy
from deploy.folder import Port
from deploy.manifest import Manifest


def readme(manifest: Manifest, policies: Mapping[str, Policy]) -> str:
    """What the folder holds and how to run it, as Markdown; `policies` are by precision."""
    view = manifest.view
    network = manifest.network
    found = next(iter(policies))
    text = Template(Path(__file__).with_name("folder.md").read_text(encoding="utf-8"))
    return text.substitute(
        name=network.name,
        num_classes=network.num_classes,
        expected=_expected(policies[found]),
        found=found,
        precisions=", ".join(policies),
        policies="\n".join(f"| `{file}` | the policy in {one} |" for one, file in manifest.policies.items()),
        menu=f"; it may be swapped for {', '.join(f'`{name}`' for name in manifest.menu)}"
        * bool(manifest.menu),
        stages="\n".join(
            f"| {k} | {one.exit} | {_words(one.inputs)} | {_words(one.outputs)} |"
            for k, one in enumerate(manifest.stages)
        ),
        size=view.size,
        sizing=f"short side to {view.resize} pixels, then the middle cut out"
        if view.resize
        else "to the square",
        interpolation=view.interpolation,
        mean=list(view.mean),
        std=list(view.std),
        more="\n\n" + COMPILED if manifest.stages[0].compiled else "",
    )


COMPILED = """`stageK.compiled.pt2` are machine code for the processor of the export, of the same programs:
`torch._inductor.aoti_load_package(file)`. They name folders of the machine that made them."""


def _expected(policy: Policy) -> str:
    known = [] if policy.accuracy is None else [f"accuracy {100 * policy.accuracy:.2f} %"]
    known += [] if policy.macs is None else [f"{policy.macs / 1e6:,.1f} million multiply-adds per image"]
    return f"Expected of it, by the calibration images: {', '.join(known)}." if known else ""


def _words(tensors: tuple[Port, ...]) -> str:
    return ", ".join(f"{one.name} {list(one.shape)}" for one in tensors) or "none"
