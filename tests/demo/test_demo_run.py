"""A whole demo, small: numbers that must hold, files that must be there, refusals that come before any training."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from sift_compiler.demo import networks
from sift_compiler.demo.datasets import load_dataset
from sift_compiler.demo.options import DemoOptions
from sift_compiler.demo.run import run
from sift_compiler.errors import UserError
from sift_compiler.storage import load

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def demo(folder, **given):
    text = io.StringIO()
    chosen = {"seeds": 2, "epochs": 1, "train_limit": 64, "batch_size": 16, "sparsity": (0.75,), "runtime": "eager"}
    report = run(DemoOptions(out=folder, **{**chosen, **given}), Console(file=text, width=80))
    return report, text.getvalue()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, *demo(folder)


def test_report_holds_what_was_found(small):
    _, report, _ = small
    dense, sparse = report.networks
    assert abs(sparse.flops / dense.flops - 1) < 1e-3
    assert sparse.widths == tuple(2 * width for width in dense.widths)
    assert [run.seed for run in sparse.runs] == [0, 1]
    assert all(run.steps == 4 and run.mask_updates == 3 and run.skipped_updates == 0 for run in sparse.runs)
    assert all(0 <= run.accuracy <= 1 and len(run.losses) == 1 for run in (*dense.runs, *sparse.runs))
    found = sparse.sparse
    assert (found.graphs.traced, found.graphs.recompiles, found.graphs.refused) == (2, 0, ())
    assert found.graphs.kernels == 2 * 9
    assert found.respecialisation is None, "the eager runtime has nothing to re-specialise"
    assert found.compiled_difference < 1e-5
    assert sparse.memory.total < found.masked_memory.total
    assert min(sparse.forward.median_ms, dense.forward.median_ms, found.masked_forward.median_ms) > 0


def test_files_are_written_and_the_network_can_be_loaded(small):
    folder, report, text = small
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "report.json", "sparse.pt2"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((folder / "report.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["networks"][1]["flop_ratio"] == pytest.approx(1, abs=1e-3)
    assert {"machine", "recipe", "threads", "options", "stages"} <= written.keys()
    loaded = load(folder / "sparse.pt2")
    data = load_dataset("digits")
    with torch.no_grad():
        right = (loaded.eval()(data.test_images).argmax(1) == data.test_labels).float().mean()
    assert float(right) == pytest.approx(report.saved.accuracy, abs=2e-3)
    assert "test accuracy" in text
    assert "Sparse Wide" in text
    assert "\x1b" not in text, "no progress bars and no colours in a pipe"
    assert max(len(line) for line in text.splitlines()[:-1]) <= 80


def test_the_same_seed_gives_the_same_curves(small):
    _, report, _ = small
    data = load_dataset("digits").limited(64)
    recipe = dataclasses.replace(report.recipe, seeds=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = networks.train_dense(data, recipe, lambda: None).runs[0]
    finally:
        torch.set_num_threads(threads)
    assert again.losses == pytest.approx(report.dense.runs[0].losses, rel=1e-5)


def test_refusals_come_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "train_dense", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    for given, message in (
        ({"folder": tmp_path / "file"}, "Nothing can be written"),
        ({"dataset": "cifar100", "data": tmp_path}, "does not hold the data set"),
        ({"train_limit": 8}, "8 training images do not fill one batch of 16"),
        ({"train_limit": 5000}, "797 training images; a limit of 5000"),
        ({"sparsity": (0.75, 0.99999)}, "FLOPs"),
    ):
        with pytest.raises(UserError, match=message):
            demo(**{"folder": tmp_path / "out", **given})


@pytest.mark.parametrize("package", ["matplotlib", "sklearn.datasets"])
def test_a_missing_package_is_a_refusal_that_says_how_to_install_it(tmp_path, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'sift_compiler\[demo\]'"):
        demo(tmp_path)
