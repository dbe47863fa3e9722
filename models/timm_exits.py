"""Networks of timm (https://github.com/huggingface/pytorch-image-models), as they are or with exits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, fx, nn

from models.backbones import check_timm_name, stochastic_depth
from models.bases import SingleExit, Spans
from models.errors import UserError
from models.layers import MapHead, VectorHead, check_choice
from models.registry import register

Part = Callable[..., Sequence[Tensor]]


class TimmNet(SingleExit):
    """Any timm model as a one-exit network, in timm's halves `forward_features` and `forward_head`.

    `pretrained` loads timm's published weights (needs network access), whose own head is kept if
    `num_classes` agrees.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int = 1000,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        import timm

        super().__init__()
        check_timm_name(name)
        self.net: nn.Module = timm.create_model(
            name,
            num_classes=num_classes,
            pretrained=pretrained,
            drop_rate=drop_rate,
            **stochastic_depth(drop_path_rate),
        )

    def extract(self, images: Tensor) -> Tensor:
        """timm's features before pooling."""
        return self.net.forward_features(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.net.forward_head(features)


class TimmExits(Spans):
    """Exits on the feature maps of any timm model that offers them (`features_only`).

    The forward pass is traced once and cut at the maps, so that a stage runs just what its exit needs beyond
    the stages before it, whatever the architecture. Weights of the backbone have
    timm's names with "backbone." before them, as `--finetune FILE --model_prefix backbone.` expects.

    Args:
        backbone: timm's name of the model.
        exits: how many of its maps get an exit, counted from the end.
        out_indices: numbers of the maps that get one, instead of `exits`.
        head: what an exit reads: a "map" (`MapHead`), or "pooled" features, means over positions [B, C]
            (`VectorHead`), which are small enough to be kept for all images.
        head_width: channels that an exit classifies by.
        pretrained: start from timm's published weights (needs network access).
        drop_rate: dropout before each exit's linear layer.
        drop_path_rate: stochastic depth of the backbone.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        backbone: str = "mobilenetv3_large_100",
        exits: int = 4,
        out_indices: Sequence[int] | None = None,
        head: str = "map",
        head_width: int = 512,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        import timm

        super().__init__()
        check_timm_name(backbone)
        check_choice("head", head, ("map", "pooled"))
        chosen = _chosen_maps(backbone, exits, out_indices)
        self.num_exits = len(chosen)
        self.backbone: nn.Module = timm.create_model(
            backbone,
            features_only=True,
            out_indices=tuple(chosen),
            pretrained=pretrained,
            **stochastic_depth(drop_path_rate),
        )
        self.positions_first = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.pooled = head == "pooled"
        channels = self.backbone.feature_info.channels()
        self.add_exits(channels, head_width, num_classes, drop_rate, VectorHead if self.pooled else MapHead)
        # Tracing fixes the mode of functions that read it from a module, such as dropout.
        try:
            self.parts = {mode: cut(self.backbone.train(mode)) for mode in (False, True)}
        except (
            Exception
        ) as error:  # tracing runs timm's code on stand-ins for tensors, which may fail in any way
            raise UserError(f"timm's {backbone} cannot be cut at its feature maps: {error}") from error

    def span(self, k: int, *values: Tensor) -> Sequence[Tensor]:
        """Map k [B, C, H, W], or its means [B, C], and what later spans read."""
        features, *rest = self.parts[self.training][k](self.backbone, *values)
        if self.positions_first:
            features = features.permute(0, 3, 1, 2)
        return [features.mean((2, 3)) if self.pooled else features, *rest]


def _chosen_maps(backbone: str, exits: int, out_indices: Sequence[int] | None) -> Sequence[int]:
    """Numbers of the maps that get an exit. Raises ValueError where the backbone does not have them."""
    import timm

    try:
        maps = len(timm.create_model(backbone, features_only=True).feature_info.info)
    except (
        AttributeError,
        RuntimeError,
        AssertionError,
    ) as error:  # timm's ways to report that there are no maps
        raise UserError(f"timm's {backbone} offers no feature maps to put exits on: {error}") from error
    if not 1 <= exits <= maps:
        raise UserError(f"exits is {exits}; {backbone} has {maps} feature maps, so accepted: 1 to {maps}")
    chosen = range(maps - exits, maps) if out_indices is None else out_indices
    if not chosen or list(chosen) != sorted({i for i in chosen if 0 <= i < maps}):
        raise UserError(f"out_indices is {list(chosen)}; accepted: rising numbers from 0 to {maps - 1}")
    return chosen


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.whole = (nn.modules.batchnorm._BatchNorm, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that tracing does not enter: no parts, batch norms, what timm marks to run as a whole.

        timm's batch norms have an activation inside.
        """
        return isinstance(m, self.whole) or not any(True for _ in m.children())


class _Section(NamedTuple):
    """The nodes of one part: its map, what it computes, and what it reads of earlier parts."""

    end: fx.Node
    made: set[fx.Node]
    reads: set[fx.Node]


def cut(backbone: nn.Module) -> list[Part]:
    """The forward pass of a network that returns a list of maps, in as many parts, in the mode that it is in.

    Part k, called with the network and the values that part k - 1 returned after its map (the images for part
    0), returns map k and the values that later parts read: tensors with the batch on dim 0. Sizes and other
    values that do not depend on the images are computed where they are read.
    """
    nodes = list(_Tracer().trace(backbone).nodes)
    images = nodes[0]
    maps = nodes[-1].args[0]
    if not maps:
        raise UserError("timm collects its maps by hooks, which tracing does not see")
    sections = _sections(images, maps, carried=_carried(nodes))
    parts = []
    known = {images}
    for k, section in enumerate(sections):
        read_later = set().union(*(later.reads for later in sections[k + 1 :]))
        given = (known | section.made) & read_later
        parts.append(_part(backbone, nodes, known, section, given))
        known = given
    return parts


def _sections(images: fx.Node, maps: Sequence[fx.Node], carried: set[fx.Node]) -> list[_Section]:
    """Walks back from every map to what earlier parts have made of the values that may be `carried`."""
    ready = {images}
    sections = []
    for end in maps:
        section = _Section(end, made=set(), reads=set())
        asked = [end]
        while asked:
            node = asked.pop()
            if node in ready:
                section.reads.add(node)
            elif node not in section.made:
                section.made.add(node)
                asked.extend(node.all_input_nodes)
        ready |= section.made & carried
        sections.append(section)
    return sections


def _carried(nodes: list[fx.Node]) -> set[fx.Node]:
    """The values that one part may pass to another: tensors that depend on the images."""
    depends = {nodes[0]}
    sizes = set()
    for node in nodes:
        inputs = node.all_input_nodes
        is_arithmetic = getattr(node.target, "__module__", "") == "_operator"
        if node.target is getattr:
            is_size = node.args[1] == "shape"
        else:
            of_sizes = bool(inputs) and all(i in sizes for i in inputs)
            is_size = node.target in ("size", "dim") or (of_sizes and is_arithmetic)
        if is_size:
            sizes.add(node)
        elif any(i in depends or i in sizes for i in inputs):
            depends.add(node)
    return depends


def _part(
    backbone: nn.Module, nodes: list[fx.Node], known: set[fx.Node], section: _Section, given: set[fx.Node]
) -> Part:
    """A section as a function of the network and the values `known`; returns its map and `given` values."""
    graph = fx.Graph()
    copies = {}
    for node in (node for node in nodes if node in known):
        copies[node] = graph.placeholder(node.name)
    for node in (node for node in nodes if node in section.made):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in (section.end, *(node for node in nodes if node in given))))
    # The method, not the module: called with the network, it reads the weights that this has by then.
    return type(fx.GraphModule(backbone, graph)).forward


register(TimmNet, "timm/", "any timm model as a one-exit network")
register(TimmExits, "timm_ee", "exits on any timm model that offers feature maps")
