"""Configurations of the norm kernels in the full-size model, as ``make aot`` compiles them.

Shared by the ops that launch these kernels. A pointer that is not given is None, which Triton compiles in.
"""

from __future__ import annotations

from typing import Any

from javis.kernels.triton_support import AotSpec

_SIZES = {"frames": "i32", "places": "i32", "chunks": "i32"}
WIDTH = 1152


def _signature(pointers: dict[str, str], present: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the pointers that are there; the others are None, which Triton compiles in."""
    signature = {name: kind if name in present else "constexpr" for name, kind in pointers.items()}
    return signature, {name: None for name in pointers if name not in present}


def forward(
    kernel: Any, name: str, options: dict[str, int], *, residual: bool = False, gate: bool = False, fp8: str = ""
) -> list[AotSpec]:
    """``forward_rows`` as it is launched for 512x512 (4 rows) and 720p (8 rows), and for short audio (1 row)."""
    specs = []
    for masked in (False, True):
        for rows in (8, 4, 1):
            pointers = {f"{p}_ptr": "*bf16" for p in ("x", "h", "gate", "gate0", "shift", "shift0", "scale", "scale0")}
            pointers |= {"mask_ptr": "*i1", "r_ptr": "*bf16", "y_ptr": "*u8" if fp8 else "*bf16"}
            pointers |= {f"{p}_ptr": "*fp32" for p in ("mean", "rstd", "fp8_scale")}
            present = {"x_ptr", "shift_ptr", "scale_ptr", "y_ptr"}
            present |= {"fp8_scale_ptr"} if fp8 else {"mean_ptr", "rstd_ptr"}
            present |= {"h_ptr", "r_ptr"} if residual else set()
            present |= {"gate_ptr"} if gate else set()
            if masked:
                present |= {"shift0_ptr", "scale0_ptr", "mask_ptr"} | ({"gate0_ptr"} if gate else set())
            signature, constants = _signature(pointers, present)
            strides = ("x_b", "x_n", "h_b", "h_n", "gate_b", "gate0_b", "shift_b", "shift0_b", "scale_b", "scale0_b")
            signature |= dict.fromkeys(strides, "i32") | _SIZES | {"eps": "fp32"}
            constants |= {"WIDTH": WIDTH, "ROWS": rows, "HAS_H": residual, "HAS_GATE": gate, "MASKED": masked}
            constants |= {"FP8": fp8, "HARDWARE": bool(fp8)}
            constants["BLOCK"] = options["BLOCK"]
            aligned = (*(p for p in present if p not in ("mask_ptr", "fp8_scale_ptr")), *strides)
            specs.append(
                AotSpec(
                    name=f"{name} C={WIDTH} rows={rows}{' masked' if masked else ''} bf16",
                    min_arch=89 if fp8 else 80,
                    kernel=kernel,
                    signature=signature | {key: "constexpr" for key in constants},
                    constants=constants,
                    num_warps=options["num_warps"],
                    aligned=aligned,
                )
            )
    return specs


def backward(
    kernel: Any,
    sum_kernel: Any,
    name: str,
    options: dict[str, int],
    *,
    residual: bool = False,
    gate: bool = False,
) -> list[AotSpec]:
    """``backward_rows`` and the sum of its parts."""
    specs = []
    for masked in (False, True):
        pointers = {f"{p}_ptr": "*bf16" for p in ("dr", "dy", "r", "h", "gate", "gate0", "scale", "scale0")}
        pointers |= {"mask_ptr": "*i1", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": "*bf16"}
        pointers |= {"dh_ptr": "*bf16", "partial_ptr": "*fp32"}
        present = {"dy_ptr", "r_ptr", "scale_ptr", "mean_ptr", "rstd_ptr", "dx_ptr", "partial_ptr"}
        present |= {"dr_ptr"} if residual else set()
        present |= {"h_ptr", "gate_ptr", "dh_ptr"} if gate else set()
        if masked:
            present |= {"scale0_ptr", "mask_ptr"} | ({"gate0_ptr"} if gate else set())
        signature, constants = _signature(pointers, present)
        strides = (
            "dr_b",
            "dr_n",
            "dy_b",
            "dy_n",
            "r_b",
            "r_n",
            "h_b",
            "h_n",
            "gate_b",
            "gate0_b",
            "scale_b",
            "scale0_b",
        )
        signature |= dict.fromkeys(strides, "i32") | _SIZES | {"rows": "i32"}
        constants |= {"WIDTH": WIDTH, "BLOCK": options["BLOCK"]}
        constants |= {"HAS_H": residual, "HAS_GATE": gate, "MASKED": masked}
        mask = " masked" if masked else ""
        specs.append(
            AotSpec(
                name=f"{name} C={WIDTH}{mask} bf16",
                kernel=kernel,
                signature=signature | {key: "constexpr" for key in constants},
                constants=constants,
                num_warps=options["num_warps"],
                aligned=(*(p for p in present if p not in ("mask_ptr", "mean_ptr", "rstd_ptr")), *strides),
            )
        )
        sums = 3 if gate else 2
        signature, constants = _signature(
            {"partial_ptr": "*fp32", "mask_ptr": "*i1", "out_ptr": "*bf16"},
            {"partial_ptr", "out_ptr"} | ({"mask_ptr"} if masked else set()),
        )
        constants |= {"WIDTH": WIDTH, "SUMS": sums, "ROWS": 32, "BLOCK": 32, "MASKED": masked}
        signature |= {"batch": "i32", "frames": "i32", "chunks": "i32"}
        specs.append(
            AotSpec(
                name=f"{name} sums={sums} C={WIDTH}{mask} bf16",
                kernel=sum_kernel,
                signature=signature | {key: "constexpr" for key in constants},
                constants=constants,
                num_warps=4,
                aligned=("partial_ptr", "out_ptr"),
            )
        )
    return specs
