"""GPT-3 small: the FLOPs of the paper's Table 15 and the sparsities that balance them, on the meta device, where no weight exists.

FLOPs of one forward and backward pass of a sequence: 6 T [L ((1 - s)(4 d d + 2 d f) + 2 T d) + d V].
"""

from __future__ import annotations

import copy

import pytest
import torch

from sift_compiler import pipeline
from sift_compiler.capture import capture
from sift_compiler.errors import InfeasibleError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import count_flops
from sift_compiler.options import SparseWide
from sift_compiler.passes.adopt_layers import AdoptLayers
from sift_compiler.passes.balance_flops import BalanceFlops
from sift_compiler.passes.select_layers import SelectLayers

LAYERS, TOKENS, VOCABULARY, HEADS = 12, 1024, 50257, 12
WORDS = {"input_ids": torch.empty(1, TOKENS, dtype=torch.long, device="meta")}


def formula(width, inner, sparsity=0.0):
    matrices = 4 * width * width + 2 * width * inner
    return 6 * TOKENS * (LAYERS * ((1 - sparsity) * matrices + 2 * TOKENS * width) + width * VOCABULARY)


@pytest.fixture(scope="module")
def gpt3(architectures):
    def build(width=768, inner=3072, layers=LAYERS):
        with torch.device("meta"):
            model, _ = architectures.gpt2(layers, width, HEADS, inner, VOCABULARY, TOKENS)
        return model

    return build


@pytest.fixture(scope="module")
def captured(gpt3):
    return pipeline.run(capture(gpt3(), WORDS), pipeline.preparing()).graph_module


def test_flops_of_the_formula_and_of_the_paper(gpt3):
    dense = count_flops(gpt3(), WORDS).total
    assert 3 * dense == formula(768, 3072)
    assert formula(768, 3072) == pytest.approx(8.763e11, rel=2e-3), "the paper's Table 15"
    assert formula(1092, 4344, 0.5) == pytest.approx(1.029e12, rel=2e-3)
    assert 3 * count_flops(gpt3(1092, 4344), WORDS).total == formula(1092, 4344)


@pytest.mark.parametrize(("width", "inner", "sparsity"), [(1092, 4344, 0.645273), (1536, 6144, 0.919165)])
def test_sparsity_that_balances_given_widths(gpt3, width, inner, sparsity):
    """Selection and balance on a model that is wide already."""
    dense = count_flops(gpt3(), WORDS)
    graph_module = capture(gpt3(width, inner), WORDS)
    AdoptLayers()(graph_module)
    SelectLayers()(graph_module)
    chosen = [decision for decision in notes.decisions(graph_module).values() if decision.sparse]
    assert len(chosen) == 4 * LAYERS
    BalanceFlops(dense, WORDS, width / 768)(graph_module)
    balance = notes.balance(graph_module)
    assert balance.sparsity == pytest.approx(sparsity, abs=5e-7)
    kept = sum(each.kept for each in notes.decisions(graph_module).values() if each.sparse)
    assert kept / (LAYERS * (4 * width * width + 2 * width * inner)) == pytest.approx(1 - sparsity, abs=1e-6)


def test_the_rewrite_at_three_quarters(captured):
    """All passes up to the balance: 768 → 1536, 12 heads of 64 → 12 of 128."""
    dense, graph_module = count_flops(captured, WORDS), copy.deepcopy(captured)
    pipeline.run(graph_module, pipeline.planning({"*": SparseWide(sparsity=0.75)}, dense, WORDS))
    assert notes.balance(graph_module).sparsity == pytest.approx(0.919165, abs=5e-7)
    decisions = notes.decisions(graph_module)
    assert decisions["transformer.h.11.attn.c_attn"].widened_shape == (3 * 1536, 1536)
    assert decisions["transformer.h.11.mlp.c_fc"].widened_shape == (6144, 1536)
    assert graph_module.lm_head.weight.shape == (VOCABULARY, 1536)


def test_ninety_percent_is_infeasible(captured):
    """What stays dense grows as k (head, attention products); it costs all of the dense model at k = 2.478."""
    dense, graph_module = count_flops(captured, WORDS), copy.deepcopy(captured)
    staying = 4 * LAYERS * TOKENS**2 * 768 + 2 * TOKENS * 768 * VOCABULARY
    assert dense.total / staying == pytest.approx(2.478, abs=5e-4)
    planning = pipeline.planning({"*": SparseWide(sparsity=0.9, round_to=1)}, dense, WORDS)
    with pytest.raises(
        InfeasibleError, match=r"Widening by 3.1623 cannot.*lm_head.*largest feasible widening is about 2\.47[89]"
    ):
        pipeline.run(graph_module, planning)
