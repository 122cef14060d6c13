"""SiftCallback under a real Trainer of transformers."""

import importlib
import shutil
import sys

import pytest
import torch
from torch import nn

import sift_compiler as sift
from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.nn import SparseLayer

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from sift_compiler.integrations.huggingface import FILE, SiftCallback  # noqa: E402


class Classifier(nn.Module):
    """What a Trainer wants: keyword inputs, a loss."""

    def __init__(self, seed=0, sparse=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 8), nn.Linear(8, 3)
        )
        if sparse:
            self.net = sift.rewrite(self.net, torch.randn(2, 6), sift.SparseWide(sparsity=0.5))
        self.to(dtype)

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(dtype=torch.float32, size=40):
    generator = torch.Generator().manual_seed(7)
    return [
        {"x": torch.randn(6, generator=generator).to(dtype), "labels": int(torch.randint(3, (), generator=generator))}
        for _ in range(size)
    ]


def trained(
    folder, *, model=None, callback=None, method=None, resume=None, dtype=torch.float32, evaluate=False, scaler=None, **options
):  # fmt: skip
    model = Classifier(dtype=dtype) if model is None else model
    method = method or sift.RigL(delta_t=2, end_step=20, drop_fraction=0.4, decay="constant")
    callback = callback or SiftCallback(method)
    defaults = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", seed=3,
        eval_strategy="steps" if evaluate else "no", eval_steps=3, **{**defaults, **options},
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data(dtype), eval_dataset=data(dtype, 8), callbacks=[callback]
    )
    # What Accelerate makes for fp16=True, on devices that have it.
    trainer.accelerator.scaler = scaler
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def timeless(masks):
    return [{**update.to_plain(), "milliseconds": 0} for update in masks.updates]


def same_state(one, other):
    states = one.model.state_dict(), other.model.state_dict()
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert different == []
    for a, b in zip(
        one.optimizer.state_dict()["state"].values(), other.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "bf16": True, "max_grad_norm": 0.1}])
@pytest.mark.parametrize("kind", [sift.RigL, sift.SNFS])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, kind, options):
    method = kind(delta_t=2, end_step=20, drop_fraction=0.4, decay="constant")
    straight, callback = trained(tmp_path / "a", method=method, save_strategy="steps", save_steps=5, **options)
    assert [update.step for update in callback.masks.updates] == [0, 2, 4, 6, 8]
    assert callback.masks.step_count == 10
    assert (tmp_path / "a" / "checkpoint-5" / FILE).is_file()
    for layer in straight.model.modules():
        if isinstance(layer, SparseLayer):
            layer.pattern.check()

    shutil.rmtree(tmp_path / "a" / "checkpoint-10")
    resumed, again = trained(tmp_path / "a", method=method, model=Classifier(seed=99), resume=True, **options)
    same_state(straight, resumed)
    assert timeless(again.masks) == timeless(callback.masks)
    # Training over, the schedule has let go: the optimizer's next step moves no mask.
    before = [one.index.clone() for one in resumed.model.modules() if isinstance(one, SparseLayer)]
    resumed.optimizer.step()
    after = [one.index for one in resumed.model.modules() if isinstance(one, SparseLayer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_accumulated_batches_move_masks_as_one_batch_does_and_evaluation_changes_nothing(tmp_path):
    # float64: the sums differ in rounding only, and no two scores are that close.
    runs = [
        trained(tmp_path / name, dtype=torch.float64, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, evaluate=evaluate)
        for name, size, evaluate in (("a", 8, False), ("b", 2, False), ("c", 2, True))
    ]  # fmt: skip
    layers = [[one for one in trainer.model.modules() if isinstance(one, SparseLayer)] for trainer, _ in runs]
    assert len(runs[0][1].masks.updates) == 5
    for one, *others in zip(*layers, strict=True):
        for other in others:
            assert torch.equal(one.pattern.mask(), other.pattern.mask())
            torch.testing.assert_close(one.dense_weight(), other.dense_weight(), rtol=0, atol=1e-9)
    same_state(runs[1][0], runs[2][0])


def test_the_trainer_does_what_a_plain_loop_does(tmp_path):
    trainer, callback = trained(tmp_path, max_steps=4, lr_scheduler_type="constant", max_grad_norm=0.0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-8, weight_decay=0.0)
    masks = sift.schedule(model, optimizer, callback.method)
    transformers.set_seed(3)
    for batch in list(trainer.get_train_dataloader())[:4]:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    assert timeless(masks) == timeless(callback.masks)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, trainer.model.state_dict()[name], rtol=0, atol=1e-6)


def test_what_cannot_be_resumed_or_scheduled_is_refused(tmp_path):
    method = sift.SET(delta_t=2, end_step=20)
    with pytest.raises(UserError, match="Rewrite the model first"):
        trained(tmp_path, model=Classifier(sparse=False))
    with pytest.raises(UserError, match="expects a mask method"):
        SiftCallback("rigl")
    with pytest.raises(UserError, match="gradient_accumulation_steps is 2"):
        trained(tmp_path, method=sift.RigL(end_step=9, accumulates=False), gradient_accumulation_steps=2)

    trained(tmp_path / "a", method=method, max_steps=2, save_strategy="steps", save_steps=2)
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "a" / "checkpoint-2", moved)
    with pytest.raises(UserError, match=r"SiftCallback\(method, checkpoint=folder\)"):
        trained(tmp_path / "b", method=method, resume=str(moved))
    _, callback = trained(
        tmp_path / "b", callback=SiftCallback(method, checkpoint=moved), resume=str(moved), max_steps=3
    )
    assert callback.masks.step_count == 3

    trained(
        tmp_path / "other", model=Classifier(seed=5), method=method, max_steps=2, save_strategy="steps", save_steps=2
    )
    shutil.copy(tmp_path / "other" / "checkpoint-2" / FILE, moved / FILE)
    with pytest.raises(StaleArtifactError, match="other masks"):
        trained(tmp_path / "b", callback=SiftCallback(method, checkpoint=moved), resume=str(moved))
    (moved / FILE).write_bytes((moved / FILE).read_bytes()[:200])
    model = Classifier()
    with pytest.raises(StaleArtifactError, match="damaged"):
        trained(tmp_path / "b", model=model, callback=SiftCallback(method, checkpoint=moved), resume=str(moved))
    # The schedule that could not be resumed has let go of the model.
    sift.schedule(model, torch.optim.SGD(model.parameters(), 0.1), method)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sift_compiler.integrations.huggingface")
    with pytest.raises(UserError, match="pip install transformers accelerate"):
        importlib.import_module("sift_compiler.integrations.huggingface")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_scale_of_the_loss_changes_nothing(tmp_path, optim):
    method = sift.SNFS(delta_t=2, end_step=20, drop_fraction=0.4, decay="constant")
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)):
        options = {"optim": optim, "max_grad_norm": 0.0, "dtype": torch.float64, "gradient_accumulation_steps": 2}
        runs.append(trained(tmp_path, method=method, scaler=scaler, **options))
        assert len(runs[-1][1].masks.updates) == 5
    assert scaler.get_scale() == 2.0**9
    same_state(runs[0][0], runs[1][0])
    assert timeless(runs[0][1].masks) == timeless(runs[1][1].masks)
