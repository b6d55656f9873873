"""The drawn graph is the network: each layer, each parameter, each skip connection."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from research.networks import CNN, ResNet9, from_torchvision
from research.pictures.graph import MOST_ROWS, draw_graph, find_partings, summarize
from research.pictures.trace import trace

SVG = "{http://www.w3.org/2000/svg}"


def draw(network: nn.Module, image_shape, folder: Path) -> ET.Element:
    path = folder / "graph.svg"
    draw_graph(network, image_shape, path)
    root = ET.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    return root


def words(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def hints(root: ET.Element) -> str:
    return "\n".join(title.text or "" for title in root.iter(f"{SVG}title"))


def leaves(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if not list(module.children())]


def counted(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("make", [CNN, ResNet9, lambda: from_torchvision("resnet18")])
def test_every_layer_and_the_number_of_parameters_are_told(tmp_path, make):
    network = make()
    root, table = draw(network, (3, 32, 32), tmp_path), summarize(network, (3, 32, 32))
    for name in leaves(network):
        assert f"{name}: " in hints(root)
        assert f"\n{name} " in table
    assert words(root)[0] == f"{type(network).__name__}: {counted(network):,} parameters"
    assert table.splitlines()[-1].split() == ["total", f"{counted(network):,}"]


def test_the_table_of_the_cnn_is_this():
    lines = summarize(CNN(), (3, 32, 32)).splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line}
    assert rows["features.conv1"] == "Conv2d 5×5 32 × 32 × 32 2,432"  # noqa: RUF001
    assert rows["features.pool3"] == "MaxPool2d 2×2 64 × 4 × 4 -"  # noqa: RUF001
    assert rows["head.linear1"] == "Linear 64 65,600"
    assert len({len(line) for line in lines[2:]}) == 1


def test_shapes_are_those_of_the_outputs():
    network = ResNet9(width=4).eval()
    shapes = {}
    for name, module in network.named_modules():
        module.register_forward_hook(
            lambda m, x, y, name=name: shapes.__setitem__(name, tuple(y.shape[1:]))
        )
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    graph = trace(network, (3, 32, 32))
    told = {node.name: node.shape for node in graph.nodes if node.name in shapes}
    assert told == {name: shapes[name] for name in leaves(network)}
    assert graph.nodes[-1].shape == (10,)


def test_skip_connections_of_resnet9_are_drawn(tmp_path):
    network = ResNet9(width=4)
    graph = trace(network, (3, 32, 32))
    names = [node.name for node in graph.nodes]
    sums = [node for node in graph.nodes if node.name == "add"]
    joined = [tuple(names[source] for source in node.inputs) for node in sums]
    assert joined == [
        ("features.layer1.pool", "features.residual1.block2.activation"),
        ("features.layer3.pool", "features.residual3.block2.activation"),
    ]
    assert [node.scope for node in sums] == ["features.residual1", "features.residual3"]
    edges = {
        (names[int(path.get("data-from", "-1"))], int(path.get("data-to", "-1")))
        for path in draw(network, (3, 32, 32), tmp_path).iter(f"{SVG}path")
        if path.get("class") == "skip"
    }
    assert edges == {
        ("features.layer1.pool", graph.nodes.index(sums[0])),
        ("features.layer3.pool", graph.nodes.index(sums[1])),
    }


def test_all_edges_of_resnet18_are_drawn_once(tmp_path):
    network = from_torchvision("resnet18")
    graph = trace(network, (3, 32, 32))
    sums = [node for node in graph.nodes if node.kind == "join"]
    assert len(sums) == 8 and all(len(node.inputs) == 2 for node in sums)
    # The branch that reduces the picture starts where the block does.
    reducing = next(n for n in graph.nodes if n.name == "layer2.0.downsample.0")
    first = next(n for n in graph.nodes if n.name == "layer2.0.conv1")
    assert reducing.inputs == first.inputs
    edges = sum(len(node.inputs) for node in graph.nodes)
    paths = list(draw(network, (3, 32, 32), tmp_path).iter(f"{SVG}path"))
    drawn = [p for p in paths if p.get("marker-end")]
    assert len(drawn) == edges


class Branching(nn.Module):
    """Two inputs to one layer, a branch on data, a function, a shared layer, changes in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        a = self.conv(x)
        b = self.drop(a)
        if b.sum() > 1e9:
            b = -b
        c = self.conv(self.relu(F.gelu(b)))
        c += a
        y = torch.cat([c.flatten(1), x.reshape(1, -1)], dim=1) * self.scale
        assert not y.isnan().any()
        return y


def test_functions_shared_layers_and_changes_in_place_are_followed(tmp_path):
    graph = trace(Branching(), (3, 4, 4))
    told = [(node.name, node.inputs) for node in graph.nodes]
    assert told == [
        ("input", ()),
        ("conv", (0,)),
        ("drop", (1,)),
        ("gelu", (2,)),
        ("relu", (3,)),
        ("conv", (4,)),
        ("add", (5, 1)),
        ("flatten", (6,)),
        ("cat", (7, 0)),
        ("mul", (8,)),
    ]
    assert [node.parameters for node in graph.nodes if node.name == "conv"] == [84, 0]
    assert graph.parameters == 84 + 1 + 6 and graph.elsewhere == 1 + 6
    assert "outside of these layers" in summarize(Branching(), (3, 4, 4))
    assert "7 parameters are in none of them" in " ".join(
        words(draw(Branching(), (3, 4, 4), tmp_path))
    )


def test_a_network_of_one_layer_is_drawn(tmp_path):
    root = draw(nn.Linear(8, 5), (3, 8, 8), tmp_path)
    assert words(root)[:2] == ["Linear: 45 parameters", "3 × 8 × 8 in, 3 × 8 × 5 out, 1 step"]  # noqa: RUF001


def test_a_deep_network_is_folded_until_it_can_be_read(tmp_path):
    network = from_torchvision("densenet121")
    full, graph = trace(network, (3, 32, 32)), trace(network, (3, 32, 32), MOST_ROWS)
    assert graph.folded == 3 and len(graph.nodes) <= MOST_ROWS < len(full.nodes)
    assert graph.parameters == counted(network) and graph.elsewhere == full.elsewhere == 0
    assert "only the upper 3 levels" in " ".join(words(draw(network, (3, 32, 32), tmp_path)))


def test_columns_part_only_where_a_single_result_is_needed():
    nodes = trace(from_torchvision("resnet18"), (3, 32, 32)).nodes
    partings = find_partings(nodes)
    assert partings
    for place in partings:
        crossing = {s for node in nodes[place:] for s in node.inputs if s < place}
        assert crossing == {place - 1}


def test_tracing_leaves_the_network_as_it_was():
    network = CNN(dropout=0.5, normalization="BatchNorm2d")
    network.features.pool1.eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    for shape in [(3, 32, 32), (3, 31, 32)]:
        try:
            trace(network, shape)
        except ValueError:
            assert shape == (3, 31, 32)
        assert [module.training for module in network.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(v, state[name]) for name, v in network.state_dict().items())


def test_a_network_that_does_not_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"The graph of CNN cannot be drawn, .* \(3, 8, 8\)"):
        draw_graph(CNN(), (3, 8, 8), tmp_path / "graph.svg")
    assert not (tmp_path / "graph.svg").exists()


def test_a_compiled_network_and_one_in_half_precision_are_drawn(tmp_path):
    network = CNN()
    expected = trace(network, (3, 32, 32))
    network.compile(backend="eager")
    assert trace(network, (3, 32, 32)) == expected
    assert trace(CNN().to(torch.bfloat16), (3, 32, 32)) == expected


def test_names_that_are_no_xml_are_escaped(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a<b>&\"'\x01", nn.Linear(8, 5))

        def forward(self, x):
            return next(self.children())(x)

    assert "a<b>&\"'" in words(draw(Net(), (3, 8, 8), tmp_path))
