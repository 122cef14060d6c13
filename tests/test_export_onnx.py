"""ONNX export: what the file holds, what ONNX Runtime computes from it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import sift_compiler as sift
from sift_compiler.nn import MaskHook, SparseConv2d, SparseLinear
from sift_compiler.passes.schedule_masks import ScheduleMasks

TOLERANCE = 1e-5


class Residual(nn.Module):
    """Dense stem, sparse residual block, grouped strided convolution, sparse head."""

    def __init__(self, sparsity: float = 0.9) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        sparse = {"sparsity": sparsity, "generator": generator}
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = SparseConv2d(32, 32, 3, padding=1, bias=False, **sparse)
        self.norm = nn.BatchNorm2d(32)
        self.down = SparseConv2d(32, 48, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 1), groups=2, **sparse)
        self.hidden = SparseLinear(48, 64, **sparse)
        self.head = SparseLinear(64, 10, bias=False, **sparse)
        self.dropout = nn.Dropout(0.5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.block(x)) + x)
        x = self.down(x).mean((2, 3))
        return self.head(self.dropout(torch.relu(self.hidden(x))))


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def largest_error(path: Path, module: nn.Module, *inputs: Tensor) -> float:
    module.eval()
    with torch.no_grad():
        expected = module(*inputs)
    runtime = session(path)
    names = [one.name for one in runtime.get_inputs()]
    (found,) = runtime.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    assert found.shape == tuple(expected.shape)
    return float((torch.from_numpy(found) - expected).abs().max())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Residual]:
    torch.manual_seed(0)
    module = Residual()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert sift.export(module, torch.randn(2, 3, 12, 12), path, runtime="onnx") == path
    return path, module


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_computes_what_eager_computes(exported: tuple[Path, Residual], batch: int) -> None:
    path, module = exported
    assert largest_error(path, module, torch.randn(batch, 3, 12, 12)) < TOLERANCE


def test_file_is_standard_onnx_with_compact_weights(exported: tuple[Path, Residual]) -> None:
    path, module = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("ScatterElements") == 4
    initializers = {one.name: list(one.dims) for one in model.graph.initializer}
    for name in ("block", "down", "hidden", "head"):
        layer = getattr(module, name)
        assert initializers[f"{name}.values"] == initializers[f"{name}.index"] == [layer.values.numel()]
        assert list(layer.weight_shape) not in initializers.values()
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_metadata_describe_the_layers(exported: tuple[Path, Residual]) -> None:
    path, module = exported
    notes = {one.key: one.value for one in onnx.load(path).metadata_props}
    assert notes["sift.version"]
    layers = json.loads(notes["sift.layers"])
    assert set(layers) == {"block", "down", "hidden", "head"}
    assert layers["block"] == {"weight_shape": [32, 32, 3, 3], "kept": 922, "sparsity": module.block.sparsity}
    assert str(Path.cwd()).encode() not in path.read_bytes()


def test_runtime_folds_the_scatter_when_it_loads(exported: tuple[Path, Residual], tmp_path: Path) -> None:
    session(exported[0], tmp_path / "optimized.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not operators & {"ScatterElements", "ConstantOfShape", "Reshape", "BatchNormalization"}


def test_file_size_follows_the_kept_weights(tmp_path: Path) -> None:
    module = nn.Sequential(SparseLinear(700, 700, sparsity=0.9), nn.ReLU(), SparseLinear(700, 700, sparsity=0.9))
    path = sift.export(module, torch.randn(2, 700), tmp_path / "m.onnx", runtime="onnx")
    kept = sum(layer.values.numel() for layer in (module[0], module[2]))
    compact = 8 * kept  # float32 values and int32 positions
    assert compact < path.stat().st_size < 1.1 * compact
    assert largest_error(path, module, torch.randn(3, 700)) < TOLERANCE


def test_rewritten_trained_and_hooked_model(tmp_path: Path) -> None:
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 40), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(40, 10),
    )  # fmt: skip
    x = torch.randn(6, 3, 9, 9)
    sparse = sift.rewrite(dense, x, sift.SparseWide(sparsity=0.75))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    masks = sift.schedule(sparse, optimizer, sift.RigL(delta_t=1, end_step=10))
    for _ in range(3):
        optimizer.zero_grad()
        sparse(x).square().mean().backward()
        optimizer.step()
    path = sift.export(sparse, x, tmp_path / "m.onnx", runtime="onnx")
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("ScatterElements") == sum(
        isinstance(m, (SparseConv2d, SparseLinear)) for m in sparse.modules()
    )
    optimizer.zero_grad()
    sparse(x).square().mean().backward()
    optimizer.step()  # the hooks still work
    assert len(masks.updates) == 4
    path = sift.export(sparse, x, tmp_path / "m.onnx", runtime="onnx")
    assert largest_error(path, sparse, torch.randn(2, 3, 9, 9)) < TOLERANCE


def test_empty_pattern_extra_dimensions_and_two_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none = SparseLinear(8, 6, pattern=sift.Pattern((6, 8), torch.empty(0, dtype=torch.int32)))
            self.some = SparseLinear(8, 6, sparsity=0.5)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.none(a) + self.some(b)

    module = Two()
    path = sift.export(module, (torch.randn(1, 5, 8), torch.randn(1, 5, 8)), tmp_path / "m.onnx", runtime="onnx")
    assert largest_error(path, module, torch.randn(4, 5, 8), torch.randn(4, 5, 8)) < TOLERANCE


def hooked_graph(layer: SparseLinear) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    return ScheduleMasks()(fx.GraphModule({"layer": layer}, graph)).graph_module


def test_module_is_left_as_it_is(tmp_path: Path) -> None:
    module = hooked_graph(SparseLinear(8, 6, sparsity=0.5))
    module.layer.eval()
    code = module.code
    before = {name: value.clone() for name, value in module.state_dict().items()}
    path = sift.export(module, torch.randn(2, 8), tmp_path / "m.onnx", runtime="onnx")
    assert module.training
    assert not module.layer.training
    assert module.code == code
    assert sum(isinstance(each, MaskHook) for each in module.modules()) == 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert largest_error(path, module, torch.randn(5, 8)) < TOLERANCE


def test_exported_values_are_those_of_the_moment(tmp_path: Path) -> None:
    layer = SparseLinear(8, 6, sparsity=0.5)
    path = sift.export(layer, torch.randn(2, 8), tmp_path / "m.onnx", runtime="onnx")
    with torch.no_grad():
        layer.index.copy_(sift.Pattern.random((6, 8), layer.values.numel(), torch.Generator().manual_seed(9)).index)
        layer.values.normal_()
    x = torch.randn(2, 8)
    assert largest_error(path, layer, x) > TOLERANCE
    sift.export(layer, x, path, runtime="onnx")
    assert largest_error(path, layer, x) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "onx"}, "Did you mean 'onnx'"),
        ({"runtime": "onnx", "target": "arm"}, "no targets"),
        ({"runtime": "onnx", "example_inputs": (torch.randn(2, 9),)}, "does not run on the example inputs"),
        ({"runtime": "onnx", "example_inputs": "x"}, "example_inputs must be"),
        ({"runtime": "onnx", "module": "model"}, "torch.nn.Module"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments = {"module": SparseLinear(8, 6), "example_inputs": torch.randn(2, 8), "path": tmp_path / "m.onnx"}
    with pytest.raises(sift.UserError, match=message):
        sift.export(**{**arguments, **change})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing/m.onnx", "folder.onnx"])
def test_unwritable_path_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(sift.UserError, match="cannot be written"):
        sift.export(SparseLinear(8, 6), torch.randn(2, 8), tmp_path / name, runtime="onnx")
    assert [one.name for one in tmp_path.iterdir()] == ["folder.onnx"]


def test_operator_without_translation_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x @ x.transpose(-1, -2))

    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(sift.UnsupportedError, match=r"cannot be exported to ONNX.*eigh"):
        sift.export(Odd(), torch.randn(2, 4, 4), path, runtime="onnx")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
