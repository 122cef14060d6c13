"""The example of a method of one's own runs, keeps what every method keeps, and resumes."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch

import sift_compiler as sift

PATH = Path(__file__).parent.parent / "examples" / "write_a_method.py"


@pytest.fixture
def example(monkeypatch):
    specification = importlib.util.spec_from_file_location("write_a_method", PATH)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "write_a_method", module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_it_trains_and_its_masks_move_within_their_structure(example, caplog):
    caplog.set_level(logging.INFO)
    layer = example.main()
    moved = [record.message for record in caplog.records if "weights moved" in record.message]
    assert [int(message.split()[1].rstrip(":")) for message in moved] == [0, 10, 20, 30, 40]
    assert layer.pattern.nnz == 512
    sift.NM(1, 4).check(layer.pattern)
    # The answer is in the first four inputs; masks that found it are denser there.
    assert layer.pattern.mask()[:, :4].float().mean() > 0.2
    assert float(caplog.records[-1].message.split()[1]) < 0.3
    again = example.main()
    assert torch.equal(layer.index, again.index)


def test_its_state_is_restored_only_into_the_same_method(example):
    def scheduled(method):
        model = torch.nn.Sequential(sift.SparseLinear(8, 8, sparsity=0.5))
        return sift.schedule(model, torch.optim.SGD(model.parameters(), lr=0.1), method)

    state = scheduled(example.Sensitivity(end_step=9)).state_dict()
    assert state["method"]["name"] == "Sensitivity"
    scheduled(example.Sensitivity(end_step=9)).load_state_dict(state)
    with pytest.raises(sift.UserError, match=r"moved by Sensitivity\(.*this scheduler is SET"):
        scheduled(sift.SET(end_step=9)).load_state_dict(state)
    with pytest.raises(sift.UserError, match=r"Sensitivity\(drop_fraction=2\) is not possible"):
        example.Sensitivity(end_step=9, drop_fraction=2)
