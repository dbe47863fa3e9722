"""Networks from timm (https://github.com/huggingface/pytorch-image-models): as they are, and with exits in
between."""

from collections.abc import Callable, Sequence

from torch import Tensor, fx, nn

from models.layers import MapHead
from models.multi_exit import MultiExitModel, State
from models.registry import nearest, register


class TimmNet(MultiExitModel):
    """Any timm model as a one-exit network: the trunk is its `forward_features`, the head its `forward_head`.

    `pretrained` loads timm's published weights (needs network access), whose own head is kept if
    `num_classes` agrees.
    """

    num_exits = 1

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
        _check_name(name)
        self.net: nn.Module = timm.create_model(
            name,
            num_classes=num_classes,
            pretrained=pretrained,
            drop_rate=drop_rate,
            **_depth(drop_path_rate),
        )

    def begin(self, images: Tensor) -> State:
        """The state is the images [B, 3, H, W]."""
        return images

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """timm's features before pooling, and no state: there is no later stage."""
        return self.net.forward_features(state), None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.net.forward_head(features)


def _check_name(name: str) -> None:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; {nearest(name, timm.list_models())[:400]}")


def _depth(rate: float) -> dict[str, float]:
    """Some architectures know no stochastic depth; passing a zero to those would be an error."""
    return {"drop_path_rate": rate} if rate else {}


class TimmExits(MultiExitModel):
    """Exits on the feature maps of any timm model that offers them (`features_only`).

    The forward pass is traced once and cut at the maps, so that a stage runs just what its exit needs beyond
    the stages before it, whatever the architecture. Every exit is a `MapHead`. Weights of the backbone have
    timm's names with "backbone." before them, as `--finetune FILE --model_prefix backbone.` expects.

    Args:
        backbone: timm's name of the model.
        exits: how many of its maps get an exit, counted from the end.
        out_indices: numbers of the maps that get one, instead of `exits`.
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
        head_width: int = 512,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        import timm

        super().__init__()
        _check_name(backbone)
        try:
            maps = len(timm.create_model(backbone, features_only=True).feature_info.info)
        except (
            AttributeError,
            RuntimeError,
            AssertionError,
        ) as error:  # how timm says that a model offers no maps
            raise ValueError(f"timm's {backbone} offers no feature maps to put exits on: {error}") from error
        if not 1 <= exits <= maps:
            raise ValueError(
                f"exits is {exits}; {backbone} has {maps} feature maps, so accepted: 1 to {maps}"
            )
        chosen = range(maps - exits, maps) if out_indices is None else out_indices
        if not chosen or list(chosen) != sorted({i for i in chosen if 0 <= i < maps}):
            raise ValueError(f"out_indices is {list(chosen)}; accepted: rising numbers from 0 to {maps - 1}")
        self.num_exits = len(chosen)
        self.backbone: nn.Module = timm.create_model(
            backbone,
            features_only=True,
            out_indices=tuple(chosen),
            pretrained=pretrained,
            **_depth(drop_path_rate),
        )
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        widths = self.backbone.feature_info.channels()
        self.exits = nn.ModuleList(
            MapHead(width, head_width, num_classes, act=nn.SiLU, dropout=drop_rate) for width in widths
        )
        # Functions that read a module's mode, such as dropout, have it fixed when they are traced.
        try:
            self.spans = {mode: cut(self.backbone.train(mode)) for mode in (False, True)}
        except (
            Exception
        ) as error:  # tracing runs timm's code on stand-ins for tensors, which may fail in any way
            raise ValueError(f"timm's {backbone} cannot be cut at its feature maps: {error}") from error

    def begin(self, images: Tensor) -> State:
        """The state is what later spans read, at first the images [B, 3, H, W]."""
        return [images]

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """Map k [B, C, H, W] and what later spans read."""
        features, *state = self.spans[self.training][k](self.backbone, *state)
        return (features.permute(0, 3, 1, 2) if self.channels_last else features), state

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.exits[k](features)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.whole = (nn.modules.batchnorm._BatchNorm, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules without parts, batch norms (timm's have an activation inside) and what timm marks run as a
        whole."""
        return isinstance(m, self.whole) or not any(True for _ in m.children())


def cut(backbone: nn.Module) -> list[Callable[..., tuple[Tensor, ...]]]:
    """The forward pass of a network that returns a list of maps, in as many parts, in the mode that it is in.

    Part k, called with the network and the values that part k - 1 returned after its map (the images for part
    0),
    returns map k and the values that later parts read: tensors with the batch on dim 0. Sizes and what does
    not depend on the images are computed where they are read.
    """
    nodes = list(_Tracer().trace(backbone).nodes)
    images, maps = nodes[0], nodes[-1].args[0]
    if not maps:
        raise ValueError("timm collects its maps by hooks, which tracing does not see")
    carried = _carried(nodes)
    ready, parts = {images}, []  # `ready` are the values that earlier parts have made
    for end in maps:
        asked, made, reads = [end], set(), set()
        while asked:
            node = asked.pop()
            if node in ready:
                reads.add(node)
            elif node not in made:
                made.add(node)
                asked.extend(node.all_input_nodes)
        parts.append((end, made, reads))
        ready |= made & carried
    known, functions = {images}, []
    for k, (end, made, _) in enumerate(parts):
        takes = [node for node in nodes if node in known]
        known = (known | made) & set().union(*(reads for _, _, reads in parts[k + 1 :]))
        functions.append(_function(nodes, takes, made, [end, *(node for node in nodes if node in known)]))
    return functions


def _carried(nodes: list[fx.Node]) -> set[fx.Node]:
    """The values that one part may hand to another: tensors that depend on the images."""
    depends, sizes = {nodes[0]}, set()
    for node in nodes:
        inputs = node.all_input_nodes
        asks = node.target is getattr and node.args[1] == "shape" or node.target in ("size", "dim")
        counts = (
            inputs
            and all(i in sizes for i in inputs)
            and getattr(node.target, "__module__", "") == "_operator"
        )
        if asks or counts:
            sizes.add(node)
        elif any(i in depends or i in sizes for i in inputs):
            depends.add(node)
    return depends


def _function(
    nodes: list[fx.Node], takes: list[fx.Node], made: set[fx.Node], gives: list[fx.Node]
) -> Callable[..., tuple[Tensor, ...]]:
    """The part that computes the nodes `made` from the values `takes`, as a function of the network and
    these."""
    graph, env = fx.Graph(), {}
    for node in takes:
        env[node] = graph.placeholder(node.name)
    for node in nodes:
        if node in made:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in gives))
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)  # source that torch.fx wrote from the traced network
    return names["forward"]


register(TimmNet, "timm/", "any timm model as a one-exit network")
register(TimmExits, "timm_ee", "exits on any timm model that offers feature maps")
