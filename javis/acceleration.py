"""Faster sampling of a loaded pipeline: precision, compiled blocks, CUDA graphs, in the order that works.

>>> accelerate(pipe, precision="fp8", cuda_graphs=True)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from javis.errors import UsageError
from javis.fp8_te import Scaling

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline
    from javis.precision import Precision


def accelerate(
    pipe: JavisPipeline,
    *,
    precision: Precision | None = None,
    keep: Iterable[str] | None = None,
    scaling: Scaling = "current",
    emulate: bool = False,
    compile_blocks: bool = False,
    cuda_graphs: bool = False,
    overlap: bool = False,
) -> JavisPipeline:
    """Change how a pipeline's model computes, in place.

    Args:
        pipe: on the device it will run on. Its student, if it has one, is changed alike.
        precision: of the model (:func:`javis.precision.apply_precision`); None leaves it as it was loaded.
        keep: layers that stay in bfloat16; None: those measured for these weights (``fp8.json`` beside them).
        scaling: of Transformer Engine. emulate: see `apply_precision`.
        compile_blocks: torch.compile of the blocks (:mod:`javis.compiled`). The first clip of a size is slow.
        cuda_graphs: replay each step as a CUDA graph (:mod:`javis.sample.graph`).
        overlap: picture and sound of a layer on two CUDA streams (:mod:`javis.sample.overlap`).

    Raises:
        UsageError: what cannot run here, with the reason; nothing is changed then but what came before it.
    """
    policy = pipe.residency.policy
    if policy == "staged" and precision is not None:
        raise UsageError(
            f"precision {precision} needs the model in memory, but residency 'staged' reads it for each clip"
        )
    if policy != "all" and cuda_graphs:
        raise UsageError(
            f"CUDA graphs need the model to stay where it is, but residency {policy!r} moves it; use 'all'"
        )
    student = pipe.student
    if student is not None:
        student.forget()
    models = [pipe.model] if student is None else [pipe.model, student.model(pipe, share=False)]
    if precision is not None:
        from javis.precision import apply_precision, read_keep

        if keep is None:
            folder = pipe.folder
            if folder is not None and (folder / "transformer").is_dir():
                folder = folder / "transformer"
            keep = [] if folder is None or precision == "bf16" else read_keep(folder)
        for model in models:
            apply_precision(model, precision, keep=keep, scaling=scaling, emulate=emulate)
    if overlap:
        from javis.sample.overlap import overlap_streams

        for model in models:
            overlap_streams(model)
    if compile_blocks:
        from javis import compiled

        for model in models:
            compiled.compile_blocks(model)
    if cuda_graphs:
        from javis.sample.graph import GraphedDenoiser

        pipe.denoiser = GraphedDenoiser(pipe.model)
        if student is not None:
            student.denoiser = GraphedDenoiser(models[1])
    return pipe


__all__ = ["accelerate"]
