"""Everything a user can choose, as frozen keyword-only dataclasses.

An option is checked when it is made, so that a wrong one fails where it was written, not minutes later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from sift_compiler.errors import UserError, unknown_name
from sift_compiler.ir.mask_structure import UNSTRUCTURED, Structure

# "as" makes them names of this module, too: who has options to type needs no second import.
from sift_compiler.option_values import DECAYS as DECAYS
from sift_compiler.option_values import DISTRIBUTIONS as DISTRIBUTIONS
from sift_compiler.option_values import INITIALISATIONS as INITIALISATIONS
from sift_compiler.option_values import RESTS as RESTS
from sift_compiler.option_values import SIGMAS as SIGMAS
from sift_compiler.option_values import TUNING as TUNING
from sift_compiler.option_values import Attention as Attention
from sift_compiler.option_values import Decay as Decay
from sift_compiler.option_values import Depthwise as Depthwise
from sift_compiler.option_values import Distribution as Distribution
from sift_compiler.option_values import Groups as Groups
from sift_compiler.option_values import Initialisation as Initialisation
from sift_compiler.option_values import Rest as Rest
from sift_compiler.option_values import Sigma as Sigma
from sift_compiler.option_values import Tune as Tune

_Options = TypeVar("_Options")


def _refuse(owner: object, field: str, expected: str) -> UserError:
    return UserError(
        f"{type(owner).__name__}({field}={getattr(owner, field)!r}) is not possible: {field} must be {expected}."
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Transformation:
    """What all rewrites share; use one of its children. In a mix every pattern of module paths has one of its own."""

    sparsity: float
    """Share of weights removed, in [0, 1); it sets how much wider or deeper layers become. What is applied is what balances FLOPs."""
    dense: tuple[str, ...] = ()
    """Module paths (shell patterns such as ``"layer1.*"``) that stay dense, besides the first convolution and the classifier."""
    seed: int = 0
    """Seed of the random masks and of the new weights."""
    init: Initialisation = "paper"
    """``"paper"``: Kaiming normal fan-out for convolutions, zero for the last norm of a residual block, and for linear layers (in a network with
    attention, for all) the scheme by which the model given draws its own; ``"sparse_aware"``: the same, but sparse layers count kept
    connections only (Evci et al. 2022); ``"default"``: each module's ``reset_parameters``."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise _refuse(self, "sparsity", "at least 0 and below 1")
        if self.init not in INITIALISATIONS:
            raise unknown_name("initialisation", self.init, INITIALISATIONS)

    @property
    def name(self) -> str:
        """The transformation's name in the paper."""
        return type(self).__name__

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return self.sparsity == 0


@dataclass(frozen=True, kw_only=True)
class _Masked(Transformation):
    distribution: Distribution | Mapping[str, float] = "uniform"
    """How densities differ between layers before all are scaled to balance FLOPs: ``"uniform"``; ``"er"``, ``"erk"`` (Erdős–Rényi, with
    kernel: more of small layers); or sparsities by pattern of module paths, the first that fits; other layers have ``sparsity``."""
    structure: Structure = UNSTRUCTURED
    """What masks look like: ``NM(2, 4)``, ``TransposableNM(2, 8)``, ``Block(4, 4)``, ``ConstantFanIn()``, ``Channel()`` or unstructured. Of
    n of m entries *at most* n are kept: FLOPs balance at a sparsity a little above the nominal one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.structure, Structure):
            raise _refuse(self, "structure", "a structure such as sift.NM(2, 4)")
        if isinstance(self.distribution, Mapping):
            for pattern, sparsity in self.distribution.items():
                if not isinstance(pattern, str) or not 0 <= sparsity < 1:
                    raise _refuse(self, "distribution", "a map of patterns to sparsities of at least 0 and below 1")
        elif self.distribution not in DISTRIBUTIONS:
            raise unknown_name("distribution", self.distribution, DISTRIBUTIONS)


@dataclass(frozen=True, kw_only=True)
class SparseWide(_Masked):
    """Widen every hidden layer by (1 - sparsity)^(-1/2) and sparsify it, at equal FLOPs (Sparse-IFT, Sec. 3.2.1)."""

    round_to: int = 8
    """Widths are rounded to the nearest multiple of this, at least 1. With 1 widths are rounded down, as the released code of the paper does."""
    pin: tuple[str, ...] = ()
    """Module paths or node names (shell patterns) whose sizes, in and out, stay as they are; for operators without a width rule."""
    attention: Attention = "heads_fixed"
    """``"heads_fixed"``: as many heads, each wider (to a multiple of ``round_to``, or of 4, 2, 1 where that would be far off);
    ``"head_dim_fixed"``: heads as wide as they are, but more of them. Heads whose width something else fixes grow in number."""
    depthwise: Depthwise = "sparse"
    """``"sparse"``: depthwise convolutions, whose FLOPs grow as their width only, get a density of (1 - sparsity)^(1/2) before FLOPs are
    balanced; ``"dense"``: they stay dense and the other layers make up for it."""
    groups: Groups = "groups_fixed"
    """Of other grouped convolutions: ``"groups_fixed"``: as many groups, each wider; ``"group_width_fixed"``: more groups of the same
    width (ResNeXt), with a density as of depthwise ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to < 1:
            raise _refuse(self, "round_to", "at least 1")
        for field, kind in (("attention", Attention), ("depthwise", Depthwise), ("groups", Groups)):
            if getattr(self, field) not in get_args(kind):
                raise unknown_name(field, getattr(self, field), get_args(kind))

    @property
    def widening(self) -> float:
        """Factor on every hidden width, (1 - sparsity)^(-1/2)."""
        return float((1 - self.sparsity) ** -0.5)


@dataclass(frozen=True, kw_only=True)
class _Local(_Masked):
    sigma: Sigma | None = None
    """The non-linearity inside: ``"bn_relu"`` (batch norm, then ReLU), ``"relu"``, ``"gelu"`` or ``"identity"``. None, the default, is
    ``"bn_relu"`` for convolutions and ``"gelu"`` for linear layers, which may see sequences that a batch norm does not fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sigma(self.sigma)


@dataclass(frozen=True, kw_only=True)
class SparseParallel(_Local):
    """Every layer becomes a sum of 1 / (1 - sparsity) sparse branches, each with a non-linearity (Sparse-IFT, Sec. 3.2.2)."""


@dataclass(frozen=True, kw_only=True)
class SparseFactorized(_Local):
    """Every layer becomes two sparse ones, V σ(U x), with an inner width beyond full rank (Sparse-IFT, Sec. 3.2.3)."""

    @property
    def identity(self) -> bool:
        """Never: without sparsity it is a dense factorisation."""
        return False


@dataclass(frozen=True, kw_only=True)
class SparseDoped(_Local):
    """Every layer becomes a sparse one beside a dense factorisation, V σ(U x) + σ(W x) (Sparse-IFT, Sec. 3.2.4)."""


@dataclass(frozen=True, kw_only=True)
class LowRank(Transformation):
    """The paper's dense baseline (App. B.3.2): widths as in Sparse Wide, every layer a product V σ(U x) of the rank that costs the same."""

    round_to: int = 8
    """As in :class:`SparseWide`."""
    pin: tuple[str, ...] = ()
    """As in :class:`SparseWide`."""
    sigma: Sigma | None = "identity"
    """As in :class:`SparseFactorized`; a plain product by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to < 1:
            raise _refuse(self, "round_to", "at least 1")
        _check_sigma(self.sigma)

    @property
    def widening(self) -> float:
        """Factor on every hidden width, (1 - sparsity)^(-1/2)."""
        return float((1 - self.sparsity) ** -0.5)

    @property
    def identity(self) -> bool:
        """Never: without widening it is a dense factorisation."""
        return False


TRANSFORMATIONS: Mapping[str, type[Transformation]] = {
    "wide": SparseWide,
    "parallel": SparseParallel,
    "factorized": SparseFactorized,
    "doped": SparseDoped,
    "low-rank": LowRank,
}
"""Every rewrite by its short name."""


def _check_sigma(sigma: str | None) -> None:
    if sigma is not None and sigma not in SIGMAS:
        raise unknown_name("sigma", sigma, SIGMAS)


@dataclass(frozen=True, kw_only=True)
class MaskMethod:
    """What all methods that keep or move masks share; use one of its children."""

    seed: int = 0
    """Seed of every random choice of the method."""

    def __post_init__(self) -> None:
        if not _whole(self.seed):
            raise _refuse(self, "seed", "a whole number")

    @property
    def name(self) -> str:
        """The method's name in the literature."""
        return type(self).__name__


@dataclass(frozen=True, kw_only=True)
class Static(MaskMethod):
    """The mask drawn at the rewrite never moves."""


@dataclass(frozen=True, kw_only=True)
class Moving(MaskMethod):
    """When masks move: every ``delta_t`` optimizer steps from ``begin_step`` on, before ``end_step``."""

    delta_t: int = 100
    """Optimizer steps between two mask updates, at least 1."""
    begin_step: int = 0
    """First optimizer step at which masks move. Steps are counted from 0, so with 0 they move on the very first gradient."""
    end_step: int = -1
    """Masks rest from this optimizer step on; it must be given. The papers use 75 % of training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end_step == -1:
            raise UserError(
                f"{self.name} needs end_step, the optimizer step from which on masks rest. The papers use 75 % of "
                f"training: {self.name}(end_step=int(0.75 * epochs * len(loader)))."
            )
        for field in ("delta_t", "begin_step", "end_step"):
            if not _whole(getattr(self, field)):
                raise _refuse(self, field, "a whole number")
        if self.delta_t < 1:
            raise _refuse(self, "delta_t", "at least 1")
        if self.begin_step < 0:
            raise _refuse(self, "begin_step", "at least 0")
        if self.end_step < self.begin_step:
            raise _refuse(self, "end_step", f"at least begin_step ({self.begin_step})")

    def _check_share(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise _refuse(self, field, "between 0 and 1")

    def _check_positive(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise _refuse(self, field, "a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Dynamic(Moving):
    """Methods that replace a share of the active weights at every update."""

    drop_fraction: float = 0.3
    """Share of a layer's active weights replaced at the first update, in [0, 1]."""
    decay: Decay = "cosine"
    """How the drop fraction falls to 0 at ``end_step`` T: ``"cosine"`` α/2 · (1 + cos(π t / T)), ``"linear"`` α · (1 - t / T),
    ``"exponential"`` α · (1 - t / T)³ (the name the reference implementation of RigL gives it); ``"constant"``: not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("drop_fraction")
        if self.decay not in DECAYS:
            raise unknown_name("decay", self.decay, DECAYS)


@dataclass(frozen=True, kw_only=True)
class SET(Dynamic):
    """Drop the smallest magnitudes, grow at random (Mocanu et al. 2018)."""


@dataclass(frozen=True, kw_only=True)
class RigL(Dynamic):
    """Drop the smallest magnitudes, grow where the dense gradient is largest (Evci et al. 2020, Alg. 1)."""

    exclude_just_dropped: bool = False
    """Forbid that a weight dropped in an update is grown again in the same update; the reference implementation allows it and then keeps the weight's value and optimizer state."""
    accumulates: bool | None = None
    """Whether several backward passes come before one optimizer step (gradient accumulation, a layer called twice). Of a dense gradient only
    what growth can choose from is kept as soon as the last pass has made it, so that never two layers' are there. None, the default, takes
    the most passes of any step before for all there are; on the very first step, and where fewer come, sums are held until the optimizer
    steps. False: there is one; a second is refused. True: sums are always held. Masks are the same."""
    skip_step: Literal["keep", "replace"] = "keep"
    """``"keep"``: the optimizer steps, then the mask moves; ``"replace"``: on an update step the mask moves instead (the reference implementation)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_step not in ("keep", "replace"):
            raise unknown_name("skip_step", self.skip_step, ("keep", "replace"))
        if self.accumulates not in (None, False, True):
            raise _refuse(self, "accumulates", "None, False or True")


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of ``torch.compile(model, backend="sift", options={...})``."""

    runtime: str = "tvm"
    """Who runs the sparse layers: ``"tvm"`` (mask-specialised machine code) or ``"eager"`` (the reference)."""
    rest: Rest = "auto"
    """Who runs the rest of the graph: ``"inductor"``; ``"eager"``, operation by operation; or ``"auto"``: eager mode in graphs for inference
    of which inductor could save at most a twentieth of what is read and written (lowering.remainder), inductor otherwise."""
    threads: int | None = None
    """Threads of the sparse kernels; None takes ``torch.get_num_threads()`` at compile time."""
    tune: Tune = "off"
    """Whether tiles may be measured: ``"quick"`` times a handful per layer and shape of input, ``"full"`` up to two dozen, on the layer's own
    mask; winners are kept in the user's cache folder. ``"off"``, the default, measures nothing, but takes winners that are there."""
    freeze: bool = False
    """For deployment: in graphs for inference, values of sparse layers are brought into the order of the kernels once, not at every call. Moved
    masks, other tensors and changes in place by torch (``copy_``, ``load_state_dict``, optimizer steps) are followed all the same;
    changes through ``.data`` or a NumPy view are not."""
    winograd: int = 4
    """Largest tile of Winograd's convolution, by the outputs of a 3 × 3 kernel: 4, 2, or 0 for never. In graphs for inference a convolution of moderate
    sparsity, and a dense first one, is computed with its zeros by fewer multiplications where that is faster (kernels of 2 to 5 rows and
    columns, with stride 2 of 3 to 10). Errors of a layer stay below 1e-5 of its largest output: three to five times those on kept weights with 4, no more than those with
    2. Infinities and NaN reach the outputs they belong to."""
    prune_threshold: float | None = 0.5
    """Dense layers whose weight holds at least this share of zeros, in [0, 1], run sparse where that measures faster: models that another
    tool has pruned. Only in graphs traced without gradients (``torch.no_grad()``), where a zero cannot be a weight about to be
    trained. None leaves dense layers alone."""

    def __post_init__(self) -> None:
        if self.rest not in RESTS:
            raise unknown_name("rest", self.rest, RESTS)
        if self.tune not in TUNING:
            raise unknown_name("tune", self.tune, TUNING)
        if not isinstance(self.freeze, bool):
            raise _refuse(self, "freeze", "True or False")
        if not _whole(self.winograd) or self.winograd not in (0, 2, 4):
            raise _refuse(self, "winograd", "0, 2 or 4")
        if self.threads is not None and self.threads < 1:
            raise _refuse(self, "threads", "at least 1, or None")
        if self.prune_threshold is not None and not 0 <= self.prune_threshold <= 1:
            raise _refuse(self, "prune_threshold", "in [0, 1], or None")


def from_mapping(kind: type[_Options], values: Mapping[str, Any]) -> _Options:
    """Make options from names and values; a name that ``kind`` does not have is refused with the list of those it has."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown_name(f"option of {kind.__name__}", name, known)
    return kind(**values)
