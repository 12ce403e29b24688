"""Weights divided over processes (torch FSDP2) and activations that are computed again.

FSDP2 gathers a unit's weights before its ``forward`` and frees them after. A task may run JavisDiT in two ways:

- It calls the layers, as the recipes do (`JavisLayer.forward`): those are the units.
- It calls ``condition`` and ``denoise``, which call the blocks of the layers, not the layers: then `called_blocks` are
  the units. ``condition`` also calls the projections of captions and priors (``kv``) outside their blocks, so these are
  units of their own.

What belongs to no unit (embeddings, the time blocks, the final layers) goes with the module that holds all, is gathered
once in its ``forward`` and stays until the backward pass is over. So ``forward(batch)`` may use those weights in any
way, ``condition`` and ``denoise`` included.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from javis.errors import UsageError
from javis.model.blocks import CrossAttention, PriorAttention, PriorBlock, TransformerBlock
from javis.model.dit import JavisDiT
from javis.parallel.ranks import clip_groups
from javis.train.engine_config import EngineConfig

LOW_PRECISION = ("bf16", "fp8", "fp8-te")


def is_sharded(config: EngineConfig, world: int, device: torch.device) -> bool:
    """Whether FSDP2 is used. One process needs it for its mixed precision: weights in float32, computed in bfloat16."""
    if config.sharding == "none":
        if world > 1:
            raise UsageError(f"sharding none is for one process, and there are {world}; use --sharding fsdp")
        if config.precision in LOW_PRECISION:
            raise UsageError(f"precision {config.precision} needs --sharding fsdp (or auto), for one process as well")
        return False
    return config.sharding == "fsdp" or world > 1 or config.precision in LOW_PRECISION or device.type == "cuda"


def called_blocks(model: JavisDiT) -> list[nn.Module]:
    """``TrainTask.blocks`` of a task that calls ``condition`` and ``denoise``: the blocks of all layers."""
    return [block for layer in model._layers for block in layer.blocks().values()]


def called_by_condition(block: nn.Module) -> list[nn.Module]:
    """The linear layers in one of `called_blocks` that ``JavisDiT.condition`` calls by themselves."""
    found: list[nn.Module] = []
    if not isinstance(block, (TransformerBlock, PriorBlock)):
        return found
    for module in block.modules():
        if isinstance(module, CrossAttention):
            found.append(module.kv)
        if isinstance(module, PriorAttention) and module.mode != "cross_attn":
            found.append(module.proj)
    return found


def make_training_mesh(world: int, replicas: int, device: torch.device) -> DeviceMesh:
    """("shard",), or with ``replicas`` > 1 ("replicate", "shard"): neighbours in rank share one copy of the weights.

    Raises:
        UsageError: ``replicas`` does not divide the number of processes.
    """
    if world % replicas:
        raise UsageError(f"{world} processes cannot be divided into {replicas} replicas of equal size")
    if replicas == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def make_sequence_mesh(world: int, seq: int, device: torch.device) -> DeviceMesh:
    """("data", "seq"): neighbours in rank share the tokens of the same clips.

    Weights are divided over both dimensions, as without it, so that checkpoints do not depend on this mesh.

    Raises:
        UsageError: ``seq`` does not divide the number of processes.
    """
    return init_device_mesh(device.type, (clip_groups(world, 1, seq), seq), mesh_dim_names=("data", "seq"))


def shard(module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: EngineConfig) -> None:
    """Divide ``module`` over ``mesh``, in place. Gradients are averaged in float32 whatever is computed in."""
    low = torch.bfloat16 if config.precision in LOW_PRECISION else None
    # Inputs are not cast: timesteps and positions must stay exact. The model casts what it multiplies.
    # No op of the model writes into its input, which is what this warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
    )
    for unit in blocks:
        for part in called_by_condition(unit):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def synchronise_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over processes; the last one of an accumulation does."""
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(wanted)
        module.set_requires_gradient_sync(wanted)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """All weights on every process, in the dtype of computation, for what calls the model in its own way (sampling).

    Inside, ranks may do different things: nothing is exchanged.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


# -- activations ------------------------------------------------------------------------------------------------------


def _keeps_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Matrix products and attentions are kept, the rest (norms, gates, activations) is computed again."""
    name = str(op)
    products = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten._scaled_mm.")
    if name.startswith(products) or "attention" in name or name.startswith("javis.onednn_linear"):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(blocks: Sequence[nn.Module], config: EngineConfig) -> Callable[[], None]:
    """Let blocks compute (some of) their activations again in the backward pass; the result undoes it.

    ``forward`` of the instance is replaced, so that names of parameters and classes of modules stay as they are.
    """
    if config.activation_checkpointing == "none":
        return lambda: None
    extra: dict[str, Any] = {}
    if config.activation_checkpointing == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps_products)
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **extra)  # type: ignore[method-assign]

    def undo() -> None:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward

    return undo


__all__ = [
    "called_blocks",
    "called_by_condition",
    "checkpoint_activations",
    "is_sharded",
    "make_sequence_mesh",
    "make_training_mesh",
    "shard",
    "synchronise_gradients",
    "whole",
]
