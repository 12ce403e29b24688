"""What a piece of the model costs, found out without computing it: FLOPs, bytes and the peak of memory.

A :class:`Ledger` watches code that runs on tensors of the meta device, which have shapes but no values. Each operation
that reaches the dispatcher is one :class:`Call`: FLOPs by PyTorch's own formulas (`torch.utils.flop_counter`), bytes as
each input read once and each output written once. Memory is what the outputs hold for as long as Python holds them, so
the peak is that of the very code that will run. The model's operations are taken as the kernels do them: one call, its
outputs and nothing in between (:func:`counted_ops`); so is attention, which no device computes by way of its scores.

>>> with Ledger() as ledger:
...     codec.decode(torch.empty(1, 4, 5, 32, 32, device="meta"), 17)
>>> ledger.flops, ledger.peak_bytes
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from javis.cached_reads import CACHE, CachedReads
from javis.calls import Call, Kind, Spec
from javis.cpu_workspace import cpu_workspace
from javis.kernels import onednn
from javis.kernels.cases import OpCase
from javis.model.ops import ModelOps, Rope

# Neither views by their schema nor work.
_NO_TRAFFIC = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "_reshape_alias"))


_active: list[Ledger] = []  # the contexts that are open, innermost last


class Ledger:
    """Counts what runs in its context, on the meta device and without gradients.

    Args:
        cpu: count what operations on a CPU hold beside their inputs and outputs, as far as it grows with the clip.

    Attributes:
        peak_bytes: most memory that the outputs of the operations held at one time; inputs and weights are not in it.
        live_bytes: what they hold now.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        self.cpu = cpu
        self.peak_bytes = self.live_bytes = 0
        self._calls: dict[Any, Call] = {}
        self._live: dict[int, int] = {}
        self._modes: list[Any] = []
        self.reads = CachedReads(CACHE["cuda" if torch.cuda.is_available() and not cpu else "cpu"])
        self._cached = 0.0  # share of the inputs of the model's operation that is being counted

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        """What was called, equal calls together."""
        return list(self._calls.values())

    @property
    def flops(self) -> int:
        return sum(call.count * call.flops for call in self.calls)

    @property
    def bytes(self) -> int:
        return sum(call.count * call.bytes for call in self.calls)

    # -- watching -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Ledger:
        self._modes = [torch.no_grad(), _Attention(self), _Dispatch(self)]
        for mode in self._modes:
            mode.__enter__()
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _active.pop()
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        self._modes = []

    def note(self, key: Any, kind: Kind, name: str, flops: int, moved: int, ready: Any, cached: float) -> None:
        """Count one call; ``key`` is the same for equal calls."""
        known = self._calls.get(key)
        if known is None:
            self._calls[key] = Call(kind, name, flops, moved, 1, ready, cached)
            return
        mean = (known.cached * known.count + cached) / (known.count + 1)
        self._calls[key] = replace(known, count=known.count + 1, cached=mean)

    def hold(self, made: Iterable[Tensor], taken: Iterable[Tensor]) -> None:
        """Note the memory of what an operation made; what it took from outside counts nothing."""
        for tensor, own in (*((t, False) for t in taken), *((t, True) for t in made)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            self._live[key] = storage.nbytes() if own else 0
            self.live_bytes += self._live[key]
            weakref.finalize(storage, self._release, key).atexit = False
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def besides(self, nbytes: int) -> None:
        """Note memory that an operation on a CPU holds while it runs, beside its inputs and outputs."""
        if self.cpu:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + nbytes)

    def _release(self, key: int) -> None:
        self.live_bytes -= self._live.pop(key)
        self.reads.forget(key)

    # -- the model's operations ---------------------------------------------------------------------------------------

    def _case(self, kind: Kind, op: str, case: OpCase) -> None:
        """Count one call of an op of the registry."""

        def ready(device: str) -> Callable[[], object]:
            from javis.kernels.registry import OPS

            args, kwargs = case.inputs(device=device)
            return partial(OPS[op].function, *args, **kwargs)

        # The FLOPs of what is no product are not counted: its time is that of its bytes.
        flops = 0 if kind == "other" else case.flops()
        self.note((op, case), kind, op, flops, case.bytes(), ready, self._cached)

    def _ada_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor, **options: Any) -> Tensor:
        from javis.kernels.ops.ada_layer_norm.cases import AdaLayerNormCase

        batch, tokens, width = x.shape
        case = AdaLayerNormCase(name="", dtype=x.dtype, batch=batch, frames=1, places=tokens, width=width)
        self._case("other", "ada_layer_norm", case)
        return torch.empty_like(x)

    def _gated_residual_ada_layer_norm(
        self, x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        from javis.kernels.ops.gated_residual_ada_layer_norm.cases import GatedResidualAdaLayerNormCase

        batch, tokens, width = x.shape
        case = GatedResidualAdaLayerNormCase(
            name="", dtype=x.dtype, batch=batch, frames=1, places=tokens, width=width, gated=gate is not None
        )
        self._case("other", "gated_residual_ada_layer_norm", case)
        return torch.empty_like(x), torch.empty_like(x)

    def _factorized_attention(
        self,
        qkv: Tensor,
        axis: str,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        rope: Rope | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        from javis.kernels.ops.factorized_attention.cases import FactorizedAttentionCase

        batch, frames, places, _, heads, size = qkv.shape
        case = FactorizedAttentionCase(
            name="", dtype=qkv.dtype, axis=axis, batch=batch, frames=frames, places=places, heads=heads, size=size,
            norm=q_weight is not None, rope=rope is not None,
        )  # fmt: skip
        self._case("attention", "factorized_attention", case)
        out = qkv.new_empty(batch, frames * places, heads * size)
        self.besides(2 * out.nbytes)  # q and k, normalised and rotated; on a GPU one kernel does all
        return out

    def _cross_attention(self, op: str, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        from javis.kernels.ops.prior_injection.cases import CrossAttentionCase
        from javis.kernels.ops.text_cross_attention.cases import TextCrossAttentionCase

        kind = TextCrossAttentionCase if op == "text_cross_attention" else CrossAttentionCase
        batch, tokens, _ = q.shape
        case = kind(
            name="", dtype=q.dtype, batch=batch, tokens=tokens, keys=k.shape[2], heads=k.shape[1], size=k.shape[3],
            masked=mask is not None,
        )  # fmt: skip
        self._case("attention", op, case)
        return q.new_empty(q.shape)

    def _folded_prior_injection(
        self, y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, *, heads: int
    ) -> Tensor:
        from javis.kernels.ops.folded_prior_injection.cases import FoldedPriorCase

        batch, tokens, width = y.shape
        columns = scores_weight.shape[2]
        case = FoldedPriorCase(
            name="", dtype=y.dtype, batch=batch, tokens=tokens, keys=columns // heads, heads=heads, size=width // heads
        )
        self._case("matmul", "folded_prior_injection", case)
        weights = y.new_empty(batch, tokens, columns)  # the softmax is taken in place
        out = torch.empty_like(y)
        del weights
        return out

    def _bidirectional_attention(
        self, q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor]:
        from javis.kernels.ops.bidirectional_attention.cases import BidirectionalAttentionCase
        from javis.kernels.ops.bidirectional_attention.native_impl import ROWS

        batch, video, width = q_video.shape
        case = BidirectionalAttentionCase(
            name="", dtype=q_video.dtype, batch=batch, video=video, audio=q_audio.shape[1], heads=num_heads,
            size=width // num_heads,
        )  # fmt: skip
        self._case("attention", "bidirectional_attention", case)
        out = q_video.new_empty(q_video.shape), q_audio.new_empty(q_audio.shape)
        self.besides(3 * num_heads * min(ROWS, video) * q_audio.shape[1] * 4)  # scores of a chunk, and both softmaxes
        return out

    def _linear(self, op: str, kind: Callable[..., OpCase], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, (out, width) = math.prod(x.shape[:-1]), weight.shape
        case = kind(name="", dtype=x.dtype, tokens=rows, width=width, out=out, biased=bias is not None)
        self._case("matmul", op, case)
        made = x.new_empty(*x.shape[:-1], out)
        if onednn.WHY_NOT_AUTO is None and x.dtype == torch.float32 and width > onednn._SUMMANDS:
            # In pieces (javis/kernels/onednn.py): those of the weight; of some rows the piece and two sums.
            piece = width // -(-width // onednn._SUMMANDS)
            self.besides(weight.nbytes + min(onednn._ROWS, rows) * (piece + 2 * out) * x.itemsize)
        return made


def counted_ops() -> ModelOps:
    """Operations for a model on the meta device, which the ledger of the context counts as the kernels of javis."""
    from javis.kernels.ops.gelu_linear.cases import GeluLinearCase
    from javis.kernels.ops.linear.cases import LinearCase

    def counted(method: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        def op(*args: Any, **kwargs: Any) -> Any:
            if not _active:
                raise RuntimeError("these operations compute nothing: they run in the context of a Ledger only")
            ledger, taken = _active[-1], list(_tensors((args, kwargs)))
            ledger._cached = ledger.reads.share(taken)
            made = method(ledger, *first, *args, **kwargs)
            used = [*taken, *_tensors(made)]
            ledger.reads.use(used, sum(t.nbytes for t in used))
            return made

        return op

    return ModelOps(
        ada_layer_norm=counted(Ledger._ada_layer_norm),
        gated_residual_ada_layer_norm=counted(Ledger._gated_residual_ada_layer_norm),
        factorized_attention=counted(Ledger._factorized_attention),
        text_cross_attention=counted(Ledger._cross_attention, "text_cross_attention"),
        prior_injection=counted(Ledger._cross_attention, "prior_injection"),
        folded_prior_injection=counted(Ledger._folded_prior_injection),
        bidirectional_attention=counted(Ledger._bidirectional_attention),
        gelu_linear=counted(Ledger._linear, "gelu_linear", GeluLinearCase),
        linear=counted(Ledger._linear, "linear", LinearCase),
    )


class _Attention(TorchFunctionMode):
    """Scaled dot product attention as one call without a matrix of scores."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        taken = [query, key, value, *([] if attn_mask is None else [attn_mask])]
        specs = [_spec(t) for t in taken]
        *lead, queries, width = query.shape
        out_width, keys = value.shape[-1], key.shape[-2]
        flops = 2 * math.prod(lead) * queries * keys * (width + out_width)
        out = query.new_empty(*lead[:-1], queries, lead[-1], out_width).transpose(-2, -3)  # as flash attention has it
        moved = sum(s.nbytes for s in specs) + out.nbytes
        options = tuple(sorted(more.items()))

        attend: Callable[..., Tensor] = F.scaled_dot_product_attention

        def ready(device: str) -> Callable[[], object]:
            return partial(attend, *(s.tensor(device) for s in specs), *rest, **more)

        cached = self.ledger.reads.share(taken)
        self.ledger.reads.use([*taken, out], moved)
        equal = ("attention", tuple(specs), rest, options)
        self.ledger.note(equal, "attention", "scaled_dot_product_attention", flops, moved, ready, cached)
        return out


class _Dispatch(TorchDispatchMode):
    """Everything else, as it reaches the dispatcher."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken, made = list(_tensors((args, kwargs))), list(_tensors(out))
        self.ledger.hold(made, taken)
        if func is torch.ops.aten.convolution.default:
            self.ledger.besides(cpu_workspace(*args, out=out))
        if not func.is_view and not _allocates_only(func):
            self._note(func, args, kwargs, out, taken, made)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, taken: list[Tensor], made: list[Tensor]) -> None:
        formula = flop_registry.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        moved = sum(spec.nbytes for spec in map(_spec, (*taken, *made)))
        name = func._overloadpacket.__name__
        kind: Kind = "other"
        if flops:
            kind = "conv" if "conv" in name else "attention" if "attention" in name else "matmul"
        if name == "convolution":  # of different speeds
            name = f"convolution_{taken[0].ndim - 2}d"
        plain_args, plain_kwargs = tree_map(_spec_or_value, (args, kwargs))

        def ready(device: str) -> Callable[[], object]:
            real = tree_map(
                lambda value: value.tensor(device) if isinstance(value, Spec) else _at(value, device),
                (plain_args, plain_kwargs),
                is_leaf=lambda value: isinstance(value, Spec),
            )
            return partial(func, *real[0], **real[1])

        leaves, tree = tree_flatten((plain_args, plain_kwargs), is_leaf=lambda value: isinstance(value, Spec))
        cached = self.ledger.reads.share(taken)
        self.ledger.reads.use([*taken, *made], moved)
        self.ledger.note((func, str(leaves), str(tree)), kind, name, flops, moved, ready, cached)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _spec_or_value(value: Any) -> Any:
    return _spec(value) if isinstance(value, Tensor) else value


def _at(value: Any, device: str) -> Any:
    return torch.device(device) if isinstance(value, torch.device) else value


def _allocates_only(func: Any) -> bool:
    return func._overloadpacket.__name__ in _NO_TRAFFIC
