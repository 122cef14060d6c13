"""What is recorded of moving masks: measures, the report, TensorBoard scalars, sift inspect."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sift_compiler as sift
from sift_compiler.cli import app
from sift_compiler.commands.mask_history import read_report
from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.masking import exploration
from sift_compiler.nn import SparseConv2d, SparseLinear


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        SparseConv2d(3, 8, 3, padding=1, sparsity=0.7), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        SparseLinear(32, 5, sparsity=0.8),
    )  # fmt: skip


def train(model, optimizer, steps):
    masks = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 3, 6, 6, generator=generator), torch.randint(0, 5, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        masks.append([model.get_submodule(name).pattern.mask() for name in ("0", "4")])
    return masks


def begun(recorder=None, method=None):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = method or sift.SET(delta_t=1, end_step=20, drop_fraction=0.4, decay="constant")
    return model, optimizer, sift.schedule(model, optimizer, method, recorder=recorder)


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.setdefault(tag, {})[global_step] = scalar_value


def as_index(*positions):
    return torch.tensor(positions, dtype=torch.int32)


def test_exploration_of_a_mask_by_hand():
    flags = exploration.begun(as_index(0, 1, -1, -7), 6)
    steps = [
        # mask after it, explored, oscillated, revisited, IoU with {0, 1}
        ((0, 2), 3, 0, 0, 1 / 3),
        ((0, 1), 3, 2, 1, 1.0),  # 1 comes back and 2 goes again: both are as they were two updates ago
        ((0, 1), 3, 0, 0, 1.0),
        ((3, 4), 5, 0, 0, 0.0),
        ((), 5, 2, 0, 0.0),  # 3 and 4 flip back
        ((0, 1, 2, 3, 4, 5), 6, 2, 5, 2 / 6),  # 3 and 4 again; 0, 1, 2, 3, 4 were there before
    ]
    for mask, explored, oscillated, revisited, iou in steps:
        found = exploration.follow(flags, as_index(*mask, -1))
        assert found == exploration.Exploration(
            explored=explored, oscillated=oscillated, revisited=revisited, iou_initial=iou
        ), mask
    assert flags.dtype == torch.uint8
    assert exploration.mask_iou(torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)) == 1


@pytest.mark.parametrize("kind", [sift.SET, sift.RigL])
def test_what_is_measured_is_what_the_masks_did(kind):
    method = kind(delta_t=2, end_step=20, drop_fraction=0.4, decay="constant")
    model, optimizer, masks = begun(sift.Recorder(exploration=True), method)
    history = [[model[0].pattern.mask(), model[4].pattern.mask()]]
    for step in range(12):
        after = train(model, optimizer, [step])[0]
        if step % 2 == 0:
            history.append(after)
    assert len(masks.updates) == 6
    for number, update in enumerate(masks.updates, 1):
        for place, layer in enumerate(update.layers):
            past = [each[place] for each in history[: number + 1]]
            now, last = past[-1], past[-2]
            ever = torch.stack(past).any(0)
            assert layer.explored == int(ever.sum())
            assert layer.numel == now.numel()
            assert layer.density == pytest.approx(float(now.float().mean()))
            assert layer.iou == pytest.approx(exploration.mask_iou(now, last))
            assert layer.iou_initial == pytest.approx(exploration.mask_iou(now, past[0]))
            assert layer.revisited == int((now & ~last & torch.stack(past[:-1]).any(0)).sum())
            flipped = (now == past[-3]) & (now != last) if number > 1 else torch.zeros_like(now)
            assert layer.oscillated == int(flipped.sum())
        total = sum(layer.numel for layer in update.layers)
        assert update.explored_fraction == pytest.approx(sum(layer.explored for layer in update.layers) / total)
    fractions = [update.explored_fraction for update in masks.updates]
    assert fractions == sorted(fractions)
    assert masks.updates[-1].density < fractions[-1] <= 1


def test_recording_changes_nothing_and_is_off_by_default():
    model, optimizer, masks = begun()
    train(model, optimizer, range(4))
    other, other_optimizer, recorded = begun(sift.Recorder(exploration=True))
    train(other, other_optimizer, range(4))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert "memory" in masks.state_dict()
    assert masks.state_dict()["memory"] == {}
    assert masks.updates[-1].explored_fraction is None
    flags = recorded.state_dict()["memory"]
    assert {name: sum(t.numel() * t.element_size() for t in kept.values()) for name, kept in flags.items()} == {
        "0": 216,
        "4": 160,
    }


def test_tensorboard_gets_scalars(tmp_path):
    writer = Writer()
    model, optimizer, masks = begun(sift.Recorder(writer=writer, exploration=True))
    train(model, optimizer, range(3))
    assert set(writer.scalars) == {
        "masks/drop_fraction", "masks/dropped", "masks/grown", "masks/regrown", "masks/iou", "masks/density", "masks/milliseconds",
        "masks/explored_fraction", "masks/oscillated", "masks/revisited", "masks/density/0", "masks/density/4",
    }  # fmt: skip
    assert writer.scalars["masks/iou"] == {update.step: update.iou for update in masks.updates}
    assert writer.scalars["masks/explored_fraction"][2] == masks.updates[2].explored_fraction

    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as real:
        model, optimizer, masks = begun(sift.Recorder(writer=real))
        train(model, optimizer, range(3))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("masks/dropped")] == [
        (update.step, update.dropped) for update in masks.updates
    ]
    assert "masks/explored_fraction" not in events.Tags()["scalars"]


def resumed_from(path, recorder):
    checkpoint = sift.load_checkpoint(path)
    optimizer = torch.optim.AdamW(checkpoint.module.parameters(), lr=1e-2)
    masks = sift.schedule(checkpoint.module, optimizer, checkpoint.method, recorder=recorder)
    checkpoint.restore(optimizer=optimizer, masks=masks)
    return checkpoint.module, optimizer, masks


def timeless(updates):
    return [{**update.to_plain(), "milliseconds": 0} for update in updates]


def test_a_report_is_written_as_it_happens_and_goes_on_after_a_resume(tmp_path):
    path, saved = tmp_path / "report.json", tmp_path / "run.pt2"
    recorder = sift.Recorder(report=path, exploration=True)
    model, optimizer, masks = begun(recorder)
    train(model, optimizer, range(3))
    assert len(path.read_text().splitlines()) == 4
    sift.save(model, saved, masks=masks, optimizer=optimizer, example_inputs=torch.zeros(4, 3, 6, 6))
    train(model, optimizer, range(3, 5))  # these are lost: the process dies, in the middle of a line
    with path.open("a") as file:
        file.write('{"step": 5, "lay')
    assert [each.step for each in read_report(path).updates] == list(range(5))

    model, optimizer, masks = resumed_from(saved, recorder)
    train(model, optimizer, range(3, 7))
    other, other_optimizer, straight = begun(sift.Recorder(exploration=True))
    train(other, other_optimizer, range(7))
    assert timeless(masks.updates) == timeless(straight.updates)
    assert read_report(path).updates == tuple(masks.updates)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())

    # Another run in the same file begins anew.
    model, optimizer, masks = begun(recorder, sift.RigL(delta_t=1, end_step=9))
    train(model, optimizer, range(1))
    assert read_report(path).updates == tuple(masks.updates)
    assert read_report(path).method["name"] == "RigL"


def test_a_run_without_measures_is_not_resumed_with_them(tmp_path):
    model, optimizer, masks = begun()
    train(model, optimizer, range(2))
    state = masks.state_dict()
    masks.remove()
    measuring = sift.schedule(model, optimizer, masks.method, recorder=sift.Recorder(exploration=True))
    with pytest.raises(StaleArtifactError, match=r"without Recorder\(exploration=True\)"):
        measuring.load_state_dict(state)
    assert measuring.step_count == 0
    measuring.remove()
    plain = sift.schedule(model, optimizer, masks.method)
    plain.load_state_dict(measuring.state_dict())
    assert plain.state_dict()["memory"] == {}


def test_inspect_shows_reports_and_what_was_saved(tmp_path):
    path, saved = tmp_path / "report.json", tmp_path / "run.pt2"
    model, optimizer, masks = begun(sift.Recorder(report=path, exploration=True))
    train(model, optimizer, range(4))
    sift.save(model, saved, masks=masks, optimizer=optimizer, example_inputs=torch.zeros(4, 3, 6, 6))
    dropped = sum(update.layers[1].dropped for update in masks.updates)
    explored = masks.updates[-1].explored_fraction
    for source in (path, saved):
        shown = CliRunner().invoke(app, ["inspect", str(source)])
        assert shown.exit_code == 0, shown.output
        (row,) = [
            line
            for line in shown.output.splitlines()
            if line.startswith("4 ") and "Linear" not in line and "linear" not in line
        ]
        assert row.split()[1:4] == ["4", "0.2000", str(dropped)]
        assert f"explored fraction {explored:.4f}" in shown.output
        plain = json.loads(CliRunner().invoke(app, ["inspect", str(source), "--json"]).output)
        plain = plain.get("masks", plain)
        assert plain["method"]["name"] == "SET"
        assert [each["step"] for each in plain["updates"]] == [0, 1, 2, 3]
        assert plain["updates"][3]["explored_fraction"] == explored

    sift.save(model, saved, example_inputs=torch.zeros(4, 3, 6, 6))
    assert "explored" not in CliRunner().invoke(app, ["inspect", str(saved)]).output


def test_what_is_no_report_or_recorder_is_refused(tmp_path):
    with pytest.raises(UserError, match="folder does not exist"):
        sift.Recorder(report=tmp_path / "none" / "report.json")
    with pytest.raises(UserError, match="add_scalar"):
        sift.Recorder(writer=object())
    with pytest.raises(UserError, match="True or False"):
        sift.Recorder(exploration="yes")
    with pytest.raises(UserError, match=r"sift.Recorder"):
        begun("report.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path / "none.json")
    path = tmp_path / "other.json"
    for text in ("", "[]", "{}", "nothing"):
        path.write_text(text)
        with pytest.raises(UserError, match="not a report"):
            read_report(path)
    path.write_text('{"format": 99, "method": {}, "layers": {}}')
    with pytest.raises(StaleArtifactError, match="format 99"):
        read_report(path)
    path.write_text('{"format": 1, "method": {}, "layers": {}}\n{"step": 1}\n{"step": 2}\n')
    with pytest.raises(StaleArtifactError, match="line 2"):
        read_report(path)
