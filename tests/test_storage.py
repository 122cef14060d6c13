import io
import json
import zipfile

import pytest
import torch
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.errors import StaleArtifactError, UnsupportedError, UserError
from sift_compiler.ir import annotations
from sift_compiler.ir.mask_structure import NM
from sift_compiler.masking.mest import MEST
from sift_compiler.masking.snfs import SNFS
from sift_compiler.masking.straight_through import SRSTE
from sift_compiler.nn import MaskHook, SparseConv2d, SparseLinear
from sift_compiler.nn.storage import dense_storage
from sift_compiler.options import SET, RigL, SparseDoped, SparseWide, Static
from sift_compiler.rewrite import rewrite
from sift_compiler.schedule import schedule
from sift_compiler.storage import load, load_checkpoint, save

METHODS = {
    "static": Static(),
    "set": SET(delta_t=2, end_step=20, drop_fraction=0.4, seed=3),
    "rigl": RigL(delta_t=2, end_step=20, drop_fraction=0.4, seed=3),
    "snfs": SNFS(delta_t=2, end_step=20, drop_fraction=0.4),  # remembers a tensor for every layer
    "elastic": MEST(delta_t=2, end_step=20, stages=((0, 0.5, 0.9), (5, 0.4, 0.6))),  # leaves slots empty
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = SparseConv2d(8, 8, 3, padding=1, sparsity=0.8)
        self.dropout = nn.Dropout(0.3)
        self.head = SparseLinear(32, 5, sparsity=0.6)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.stem(x)))
        x = self.dropout(x + self.body(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def sparse_graph():
    torch.manual_seed(0)
    return capture(Residual(), torch.zeros(2, 3, 6, 6))


def train(model, optimizer, steps, call=None):
    call = model if call is None else call
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 3, 6, 6, generator=generator), torch.randint(0, 5, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(x), y).backward()
        optimizer.step()


def same(a, b):
    """Bit for bit, through dictionaries, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    return a == b


def without_times(state):
    return {**state, "updates": [{**update, "milliseconds": 0} for update in state["updates"]]}


def assert_same_runs(first, second):
    (model, optimizer, masks), (model_2, optimizer_2, masks_2) = first, second
    assert same(dict(sorted(model.state_dict().items())), dict(sorted(model_2.state_dict().items())))
    names, names_2 = (dict(each.named_parameters()) for each in (model, model_2))
    for name, parameter in names.items():
        assert same(dict(optimizer.state[parameter]), dict(optimizer_2.state[names_2[name]])), name
    assert same(without_times(masks.state_dict()), without_times(masks_2.state_dict()))


def fresh_run(method, optimizer):
    model = sparse_graph()
    made = OPTIMIZERS[optimizer](model.parameters())
    return model, made, schedule(model, made, METHODS[method])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [4, 5])  # the step to come moves masks, or the last one did
def test_a_resumed_run_is_the_one_that_was_never_stopped(method, optimizer, stop, tmp_path):
    whole = fresh_run(method, optimizer)
    torch.manual_seed(1)
    train(*whole[:2], range(9))

    stopped = fresh_run(method, optimizer)
    torch.manual_seed(1)
    train(*stopped[:2], range(stop))
    path = tmp_path / "run.pt2"
    save(stopped[0], path, masks=stopped[2], optimizer=stopped[1], extra={"epoch": 1})
    torch.manual_seed(99)
    checkpoint = load_checkpoint(path)
    made = OPTIMIZERS[optimizer](checkpoint.module.parameters())
    masks = schedule(checkpoint.module, made, checkpoint.method)
    checkpoint.restore(optimizer=made, masks=masks)
    assert checkpoint.extra == {"epoch": 1}
    train(checkpoint.module, made, range(stop, 9))
    assert_same_runs(whole, (checkpoint.module, made, masks))
    assert len(masks.updates) == (0 if method == "static" else 5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumed_through_state_dicts_is_the_one_that_was_never_stopped(method, optimizer):
    whole = fresh_run(method, optimizer)
    torch.manual_seed(1)
    train(*whole[:2], range(9))

    stopped = fresh_run(method, optimizer)
    torch.manual_seed(1)
    train(*stopped[:2], range(5))
    buffer = io.BytesIO()
    torch.save({"parts": [part.state_dict() for part in stopped], "random": torch.get_rng_state()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = fresh_run(method, optimizer)
    train(*resumed[:2], range(3))  # what it did before must not matter
    for part, state in zip(resumed, saved["parts"], strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(saved["random"])
    train(*resumed[:2], range(5, 9))
    assert_same_runs(whole, resumed)


def test_a_compiled_run_resumes_bit_for_bit(tmp_path):
    def compiled(model):
        torch._dynamo.reset()
        return torch.compile(model, backend="aot_eager")

    whole = fresh_run("rigl", "adamw")
    torch.manual_seed(1)
    train(*whole[:2], range(9), compiled(whole[0]))
    stopped = fresh_run("rigl", "adamw")
    torch.manual_seed(1)
    call = compiled(stopped[0])
    train(*stopped[:2], range(5), call)
    save(call, tmp_path / "run.pt2", masks=stopped[2], optimizer=stopped[1])
    checkpoint = load_checkpoint(tmp_path / "run.pt2")
    made = OPTIMIZERS["adamw"](checkpoint.module.parameters())
    masks = schedule(checkpoint.module, made, checkpoint.method)
    checkpoint.restore(optimizer=made, masks=masks)
    train(checkpoint.module, made, range(5, 9), compiled(checkpoint.module))
    assert_same_runs(whole, (checkpoint.module, made, masks))


@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_module_computes_the_same_for_any_batch_in_the_same_mode(training, tmp_path):
    model, optimizer, _ = fresh_run("rigl", "sgd")
    train(model, optimizer, range(3))
    model.train(training)
    save(model, tmp_path / "model.pt2")
    loaded = load(tmp_path / "model.pt2")
    assert loaded.training == training
    assert not any(isinstance(module, MaskHook) for module in loaded.modules())
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())
    for size in (1, 3):
        x = torch.randn(size, 3, 6, 6)
        assert torch.equal(loaded.eval()(x), model.eval()(x))
    loaded.train()
    assert not torch.equal(loaded(x), loaded(x))  # dropout is alive


def test_an_ordinary_module_needs_example_inputs(tmp_path):
    model = nn.Sequential(SparseLinear(6, 4, sparsity=0.5), nn.ReLU())
    with pytest.raises(UserError, match=r"Saving a Sequential needs example_inputs"):
        save(model, tmp_path / "model.pt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule(model, optimizer, RigL(delta_t=1, end_step=3))
    save(model, tmp_path / "model.pt2", example_inputs=torch.randn(3, 6))
    x = torch.randn(5, 6)
    assert torch.equal(load(tmp_path / "model.pt2")(x), model(x))


def test_the_description_is_readable(tmp_path):
    model, optimizer, masks = fresh_run("rigl", "sgd")
    save(model, tmp_path / "model.pt2", masks=masks, optimizer=optimizer)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        metadata = json.loads(archive.read("archive/sift/metadata.json"))
        names = archive.namelist()
    assert metadata["layers"]["body"] == {
        "kind": "SparseConv2d", "weight_shape": [8, 8, 3, 3], "active": 116, "structure": {"name": "Unstructured"},
    }  # fmt: skip
    assert metadata["masks"]["method"]["name"] == "RigL"
    assert metadata["hooks"]
    assert not any(name.endswith((".py", ".pkl")) for name in names)


def test_an_optimizer_that_lists_parameters_in_another_order_gets_the_right_states(tmp_path):
    model, optimizer, masks = fresh_run("rigl", "adamw")
    train(model, optimizer, range(3))
    save(model, tmp_path / "run.pt2", masks=masks, optimizer=optimizer)
    checkpoint = load_checkpoint(tmp_path / "run.pt2")
    made = OPTIMIZERS["adamw"](list(checkpoint.module.parameters())[::-1])
    restored = schedule(checkpoint.module, made, checkpoint.method)
    checkpoint.restore(optimizer=made, masks=restored)
    assert_same_runs((model, optimizer, masks), (checkpoint.module, made, restored))


def test_nothing_is_half_written(tmp_path, monkeypatch):
    model = sparse_graph()
    path = tmp_path / "model.pt2"
    save(model, path)
    before = path.read_bytes()

    def full_disk(program, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full_disk)
    with pytest.raises(UserError, match=r"cannot be written.*No space left.*Nothing was changed"):
        save(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be written"):
        save(model, tmp_path / "missing folder" / "model.pt2")
    with pytest.raises(UserError, match="cannot be written"):
        save(model, tmp_path)
    assert path.read_bytes() == before


class Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_objects_are_not_saved(tmp_path, capsys):
    with pytest.raises(UserError, match="only tensors, numbers"):
        save(sparse_graph(), tmp_path / "model.pt2", extra={"object": Code()})
    assert "code ran" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def rewritten(source, target, change):
    """Copy an archive, each record passed through ``change(name, content)``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_damaged_and_foreign_files_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "model.pt2"
    save(sparse_graph(), path)
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.pt2"

    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StaleArtifactError, match="damaged or was cut short"):
        load(damaged)
    with zipfile.ZipFile(path) as archive:
        record = next(one for one in archive.infolist() if one.filename.endswith("weights/weight_0"))
    place = record.header_offset + 200
    damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    with pytest.raises(StaleArtifactError, match="damaged or was cut short"):
        load(damaged)
    damaged.write_bytes(b"no archive at all")
    with pytest.raises(UserError, match=r"not written by sift\.save"):
        load(damaged)
    damaged.write_bytes(b"")
    with pytest.raises(UserError, match=r"not written by sift\.save"):
        load(damaged)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), damaged)
    with pytest.raises(UserError, match=r"not written by sift.save.*torch.export.load"):
        load(damaged)
    with pytest.raises(UserError, match="There is no file"):
        load(tmp_path / "nothing.pt2")


def test_files_of_other_versions_and_changed_files_are_refused(tmp_path, capsys):
    path, other = tmp_path / "model.pt2", tmp_path / "other.pt2"
    save(sparse_graph(), path)

    def described(**changes):
        def change(name, content):
            if not name.endswith("metadata.json"):
                return content
            return json.dumps({**json.loads(content), **changes})

        return change

    with pytest.raises(StaleArtifactError, match="has format 99"):
        load(rewritten(path, other, described(format=99)))
    with pytest.raises(StaleArtifactError, match="not those its description names: body, head"):
        load(rewritten(path, other, described(layers={})))

    buffer = io.BytesIO()
    torch.save(Code(), buffer)
    for ending in ("sift/state.pt", "sample_inputs/model.pt"):
        hostile = rewritten(path, other, lambda name, content: buffer.getvalue() if name.endswith(ending) else content)  # noqa: B023
        with pytest.raises(StaleArtifactError):
            load(hostile)
    declared = rewritten(
        path, other,
        lambda name, content: content.replace(b'"use_pickle": false', b'"use_pickle": true', 1) if name.endswith("weights_config.json") else content,
    )  # fmt: skip
    with pytest.raises(StaleArtifactError, match="pickled objects, which could run code"):
        load(declared)
    assert "code ran" not in capsys.readouterr().out


def test_restoring_what_was_not_saved_is_refused(tmp_path):
    model, optimizer, masks = fresh_run("rigl", "sgd")
    save(model, tmp_path / "model.pt2")
    checkpoint = load_checkpoint(tmp_path / "model.pt2")
    with pytest.raises(UserError, match="without masks="):
        _ = checkpoint.method
    with pytest.raises(UserError, match="without masks="):
        checkpoint.restore(masks=masks)
    with pytest.raises(UserError, match="without optimizer="):
        checkpoint.restore(optimizer=optimizer)

    save(model, tmp_path / "model.pt2", optimizer=optimizer)
    checkpoint = load_checkpoint(tmp_path / "model.pt2")
    with pytest.raises(UserError, match="state of SGD, this optimizer is AdamW"):
        checkpoint.restore(optimizer=OPTIMIZERS["adamw"](checkpoint.module.parameters()))
    with pytest.raises(UserError, match="parameter group"):
        checkpoint.restore(optimizer=OPTIMIZERS["sgd"](list(checkpoint.module.parameters())[1:]))
    with pytest.raises(UserError, match="not parameters of the module"):
        save(model, tmp_path / "model.pt2", optimizer=OPTIMIZERS["sgd"](nn.Linear(2, 2).parameters()))


def test_a_module_that_does_not_export_is_refused(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = SparseLinear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedError, match="cannot be exported, so it cannot be saved"):
        save(Branching(), tmp_path / "model.pt2", example_inputs=torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(tmp_path):
    model = sparse_graph()
    other = nn.Sequential(SparseLinear(4, 4))
    masks = schedule(other, torch.optim.SGD(other.parameters(), lr=0.1), SET(end_step=3))
    with pytest.raises(UserError, match="masks= moves 0, which the module does not have"):
        save(model, tmp_path / "model.pt2", masks=masks)
    with pytest.raises(UserError, match="path must be a file name, not None"):
        save(model, None)
    with pytest.raises(UserError, match="path must be a file name, not 3"):
        load(3)
    with pytest.raises(UserError, match="save expects a module first"):
        save("model", tmp_path / "model.pt2")


def test_a_rewritten_model_keeps_what_was_decided_and_what_is_frozen(tmp_path):
    class Dense(nn.Sequential):
        def __init__(self):
            convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 16), (16, 16))]
            super().__init__(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    model = rewrite(Dense(), torch.randn(2, 3, 8, 8), SparseWide(sparsity=0.75))
    model.get_submodule("1").values.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=3))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert [layer.name for layer in masks.updates[0].layers] == ["2"]
    assert (
        sum(isinstance(module, MaskHook) for module in model.modules()) == 2
    )  # by the pass: one for each sparse layer
    save(model, tmp_path / "model.pt2", masks=masks)
    loaded = load(tmp_path / "model.pt2")
    assert annotations.decisions(loaded) == annotations.decisions(model)
    assert annotations.balance(loaded) == annotations.balance(model)
    assert not loaded.get_submodule("1").values.requires_grad
    assert loaded.get_submodule("2").values.requires_grad


def test_dense_storage_and_its_structure_are_saved_and_training_goes_on(tmp_path):
    def fresh():
        torch.manual_seed(0)
        layers = (
            SparseLinear(8, 8, sparsity=0.5, structure=NM(2, 4)),
            nn.ReLU(),
            SparseLinear(8, 4, sparsity=0.5, structure=NM(2, 4)),
        )
        model = dense_storage(capture(nn.Sequential(*layers), torch.zeros(2, 8)))
        return model, *scheduled(model)

    def scheduled(model):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        return optimizer, schedule(model, optimizer, SRSTE())

    def steps(model, optimizer, numbers):
        for number in numbers:
            optimizer.zero_grad()
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(number))).square().sum().backward()
            optimizer.step()

    whole, stopped = fresh(), fresh()
    steps(*whole[:2], range(5))
    steps(*stopped[:2], range(3))
    save(stopped[0], tmp_path / "run.pt2", masks=stopped[2], optimizer=stopped[1])
    checkpoint = load_checkpoint(tmp_path / "run.pt2")
    assert checkpoint.method == SRSTE()
    assert checkpoint.module.get_submodule("0").structure == NM(2, 4)
    optimizer, masks = scheduled(checkpoint.module)
    checkpoint.restore(optimizer=optimizer, masks=masks)
    steps(checkpoint.module, optimizer, range(3, 5))
    assert_same_runs(whole, (checkpoint.module, optimizer, masks))


def test_tied_parameters_are_one_parameter_again(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, words):
            return self.head(self.inner(self.embedding(words)))

    words = torch.randint(0, 20, (3, 5))
    sparse = rewrite(Tied(), words, SparseDoped(sparsity=0.5))
    save(sparse, tmp_path / "tied.pt2")
    loaded = load(tmp_path / "tied.pt2")
    assert loaded.head.weight is loaded.embedding.weight
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in sparse.named_parameters()]
    for module in (sparse, loaded):
        optimizer = torch.optim.SGD(module.parameters(), 0.5, momentum=0.9)
        module(words).square().sum().backward()
        optimizer.step()
    assert torch.equal(loaded.embedding.weight, loaded.head.weight)
    state = sparse.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
