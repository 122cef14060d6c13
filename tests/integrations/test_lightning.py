"""SiftCallback under a real Trainer of Lightning."""

import contextlib
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sift_compiler as sift
from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.nn import SparseLayer

pytest.importorskip("lightning.pytorch")
import lightning.pytorch as pl
from lightning.pytorch.plugins import MixedPrecision

from sift_compiler.integrations.lightning import SiftCallback


class Module(pl.LightningModule):
    def __init__(self, seed=0, sparse=True, manual=False, two=False, fused=False):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3)
        )
        self.other = nn.Linear(2, 2)
        if sparse:
            self.net = sift.rewrite(self.net, torch.randn(2, 6), sift.SparseWide(sparsity=0.5))
        self.automatic_optimization, self.two, self.fused = not manual, two, fused

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch, _):
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        optimizer = optimizer[-1] if isinstance(optimizer, list) else optimizer
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def validation_step(self, batch, _):
        return self.loss(batch)

    def configure_optimizers(self):
        mine = torch.optim.AdamW(self.net.parameters(), lr=1e-2, fused=self.fused)
        if self.two:
            return [torch.optim.SGD(self.other.parameters(), lr=0.1), mine]
        return {
            "optimizer": mine,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(mine, 3), "interval": "step"},
        }


def batches(size=4, total=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    dataset = TensorDataset(
        torch.randn(total, 6, generator=generator).to(dtype), torch.randint(3, (total,), generator=generator)
    )
    return DataLoader(dataset, batch_size=size)


METHOD = sift.RigL(delta_t=2, end_step=40, drop_fraction=0.4, decay="constant")


def fitted(folder, module=None, callback=None, *, epochs=2, resume=None, data=None, validate=False, **options):
    module = module or Module()
    callback = callback or SiftCallback(METHOD)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=[callback], num_sanity_val_steps=0, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches() if data is None else data, batches(8, 8) if validate else None, ckpt_path=resume)
    return module, callback, trainer


def timeless(masks):
    return [{**update.to_plain(), "milliseconds": 0} for update in masks.updates]


def same_state(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "gradient_clip_val": 0.1}]
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, options):
    for method in (METHOD, sift.SNFS(delta_t=2, end_step=40, drop_fraction=0.4, decay="constant")):
        straight, callback, first = fitted(tmp_path, callback=SiftCallback(method), **options)
        steps = 16 // options.get("accumulate_grad_batches", 1)
        assert callback.masks.step_count == steps
        assert [update.step for update in callback.masks.updates] == list(range(0, steps, 2))

        _, _, trainer = fitted(tmp_path, callback=SiftCallback(method), epochs=1, **options)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        resumed, again, second = fitted(
            tmp_path, Module(seed=99), SiftCallback(method), resume=tmp_path / "half.ckpt", **options
        )
        same_state(straight, resumed)
        assert timeless(again.masks) == timeless(callback.masks)
        states = [each.optimizers[0].state_dict()["state"] for each in (first, second)]
        for a, b in zip(states[0].values(), states[1].values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_accumulation_manual_steps_and_evaluation_agree(tmp_path):
    plain, callback, _ = fitted(tmp_path, epochs=1)
    manual, by_hand, _ = fitted(tmp_path, Module(manual=True), epochs=1)
    evaluated, beside, _ = fitted(tmp_path, epochs=1, validate=True, val_check_interval=3)
    two, second, _ = fitted(tmp_path, Module(two=True, manual=True), epochs=1)
    assert len(callback.masks.updates) == 4
    same_state(plain, evaluated)
    assert timeless(callback.masks) == timeless(beside.masks)
    # The step scheduler of learning rates is Lightning's business in automatic optimization only.
    same_state(manual, two)
    assert timeless(by_hand.masks) == timeless(second.masks)

    masks = []
    for size, parts in ((8, 1), (2, 4)):
        module = Module().double()
        fitted(tmp_path, module, epochs=1, data=batches(size, dtype=torch.float64), accumulate_grad_batches=parts)
        masks.append([one.pattern.mask() for one in module.modules() if isinstance(one, SparseLayer)])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert not torch.equal(
        masks[0][0], next(one for one in Module().modules() if isinstance(one, SparseLayer)).pattern.mask()
    )


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path):
    module, callback, trainer = fitted(tmp_path, epochs=1)
    assert callback.masks.step_count == 8
    trainer.fit_loop.max_epochs = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches())
    assert callback.masks.step_count == 16
    assert [update.step for update in callback.masks.updates] == list(range(0, 16, 2))


def test_what_cannot_be_scheduled_or_resumed_is_refused(tmp_path):
    with pytest.raises(UserError, match="Rewrite the model first"):
        fitted(tmp_path, Module(sparse=False))
    with pytest.raises(UserError, match="expects a mask method"):
        SiftCallback("rigl")
    with pytest.raises(UserError, match="accumulate_grad_batches is 2"):
        fitted(tmp_path, callback=SiftCallback(sift.RigL(end_step=9, accumulates=False)), accumulate_grad_batches=2)
    module = Module(two=True, manual=True)
    module.configure_optimizers = lambda: [torch.optim.SGD([one], lr=0.1) for one in module.net.parameters()]
    with pytest.raises(UserError, match="optimizers of Module hold sparse layers"):
        fitted(tmp_path, module)
    del module.configure_optimizers
    module, trainer = Module(), fitted(tmp_path, epochs=1)[2]
    _edited(trainer, tmp_path / "edited.ckpt", lambda state: state["layers"].popitem())
    with pytest.raises(StaleArtifactError, match="do not fit this module"):
        fitted(tmp_path, module, resume=tmp_path / "edited.ckpt")
    # The schedule that was refused has let go of the module.
    _, _, trainer = fitted(tmp_path, module, epochs=1)
    _edited(trainer, tmp_path / "without.ckpt", lambda state: state.clear())
    with pytest.raises(UserError, match="made without SiftCallback"):
        fitted(tmp_path, resume=tmp_path / "without.ckpt")


def _edited(trainer, path, edit):
    """A checkpoint of ``trainer`` after ``edit`` of what the callback saved; what is empty then is left out."""
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    (name,) = [key for key in checkpoint["callbacks"] if key.startswith("SiftCallback")]
    edit(checkpoint["callbacks"][name])
    if not checkpoint["callbacks"][name]:
        del checkpoint["callbacks"][name]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("manual", [False, True])
def test_methods_that_act_before_the_step_do_so_inside_the_closure(tmp_path, manual):
    def plain(module, method):
        """What a loop of one's own makes of it."""
        (optimizer,) = [module.configure_optimizers()["optimizer"]]
        rates = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        masks = sift.schedule(module, optimizer, method)
        for batch in batches():
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            if not manual:
                rates.step()
        return masks

    replacing = sift.RigL(delta_t=2, end_step=40, skip_step="replace")
    for method, prepare in ((replacing, lambda module: module), (sift.TopKAST(), sift.dense_storage)):
        module, own = prepare(Module(manual=manual)), prepare(Module(manual=manual))
        _, callback, _ = fitted(tmp_path, module, SiftCallback(method), epochs=1)
        masks = plain(own, method)
        assert len(callback.masks.updates) == len(masks.updates) > 0
        assert timeless(callback.masks) == timeless(masks)
        same_state(module, own)


def test_without_lightning_it_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch.callbacks", "pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sift_compiler.integrations.lightning")
    with pytest.raises(UserError, match="pip install lightning"):
        importlib.import_module("sift_compiler.integrations.lightning")


class Scaled(MixedPrecision):
    """Mixed precision with a scaler, but double precision where half would be: all numbers are those of a run without."""

    def __init__(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self):
        return contextlib.nullcontext()


REPLACES = sift.RigL(delta_t=2, end_step=40, skip_step="replace")


@pytest.mark.parametrize(
    ("method", "fused"),
    [(METHOD, False), (REPLACES, False)]
    + [(each, fused) for each in (sift.SNFS(delta_t=2, end_step=40), sift.TopKAST(delta_t=2, penalty=0.1)) for fused in (False, True)],
)  # fmt: skip
def test_the_scale_of_the_loss_changes_nothing(tmp_path, method, fused):
    runs = []
    for plugins in ([], [Scaled()]):
        module = Module(fused=fused).double()
        if isinstance(method, sift.TopKAST):
            sift.dense_storage(module)
        fitted(tmp_path, module, callback := SiftCallback(method), epochs=1, data=batches(dtype=torch.float64), plugins=plugins)  # fmt: skip
        runs.append((module, callback.masks))
    assert plugins[0].scaler.get_scale() == 2.0**8
    same_state(runs[0][0], runs[1][0])
    assert timeless(runs[0][1]) == timeless(runs[1][1])
    assert runs[0][1].step_count == 8


def test_a_step_left_out_for_an_update_must_have_been_checked_by_the_scaler(tmp_path):
    with pytest.raises(sift.UnsupportedError, match="fused=False"):
        fitted(tmp_path, Module(fused=True).double(), SiftCallback(REPLACES), data=batches(dtype=torch.float64), plugins=[Scaled()])  # fmt: skip
