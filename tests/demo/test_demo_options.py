"""Options of the demo: what they become, what is refused, and the parts of a recipe."""

import pytest
import torch
from torch import nn

from sift_compiler import nn as sift_nn
from sift_compiler.demo.options import DemoOptions, mask_method
from sift_compiler.demo.output import prepare_folder
from sift_compiler.demo.train import parameter_groups
from sift_compiler.errors import UserError
from sift_compiler.options import SET, RigL, Static


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "digit"}, "Did you mean 'digits'"),
        ({"method": "ritl"}, "Did you mean 'rigl'"),
        ({"runtime": "onnxx"}, "Unknown runtime"),
        ({"epochs": 0}, "--epochs 0"),
        ({"seeds": -1}, "--seeds -1"),
        ({"batch_size": 1}, "--batch-size 1 .* at least 2"),
        ({"train_limit": 1}, "--train-limit 1"),
        ({"threads": 0}, "--threads 0"),
        ({"sparsity": ()}, "at least once"),
        ({"sparsity": (0.9, 0.9)}, "each value once"),
        ({"sparsity": (0.75, 1.0)}, "--sparsity 1.0 .* between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        DemoOptions(**given)


def test_what_is_given_replaces_the_recipe_of_the_data_set():
    usual, given = DemoOptions(), DemoOptions(epochs=2, seeds=1, batch_size=16, train_limit=99)
    assert (given.recipe.epochs, given.recipe.seeds, given.recipe.batch_size, given.recipe.train_limit) == (
        2,
        1,
        16,
        99,
    )
    assert given.recipe.width == usual.recipe.width
    assert DemoOptions(dataset="cifar100").recipe.width != usual.recipe.width


def test_methods_rest_after_three_quarters_and_update_about_twenty_times():
    rigl = mask_method("rigl", 400, seed=3)
    assert rigl == RigL(seed=3, end_step=300, delta_t=15)
    assert mask_method("set", 1_000_000, seed=0) == SET(end_step=750_000, delta_t=100)
    assert mask_method("static", 10, seed=1) == Static(seed=1)
    assert mask_method("rigl", 1, seed=0).end_step == 0, "one step: nothing moves"


def test_weights_decay_norms_and_biases_do_not():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), sift_nn.SparseLinear(4, 4), nn.LayerNorm(4))
    decayed, free = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[2].values)]
    assert len(free["params"]) == 6
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert sum(len(group["params"]) for group in (decayed, free)) == len(list(model.parameters()))
    torch.optim.SGD([decayed, free], 0.1)


def test_folder_is_made_and_must_be_writable(tmp_path):
    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*--out"):
        prepare_folder(tmp_path / "file" / "inner")
    (tmp_path / "sparse.pt2").mkdir()
    with pytest.raises(UserError, match=r"sparse.pt2 is a folder"):
        prepare_folder(tmp_path)
