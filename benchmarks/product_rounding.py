"""Rounding of float32 products on CPU: oneDNN, which the op `linear` takes where MKL is slow, beside F.linear.

``whole`` is oneDNN as it is, ``pieces`` what `linear` makes of it: sums of at most 288 summands, added up afterwards.

    python benchmarks/product_rounding.py

Errors against float64, largest and RMS, of 512 x 256 results of unit variance. Appends one row for each number of
summands to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console

from javis.bench import append_rows, environment
from javis.kernels import onednn


def main() -> None:
    rows = []
    products = {
        "linear": F.linear,
        "whole": lambda x, weight: onednn._product(x, weight, None),
        "pieces": onednn.linear,
    }
    for summands in (128, 576, 1152, 4608):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(512, summands, generator=generator)
        weight = torch.randn(256, summands, generator=generator) / summands**0.5
        exact = x.double() @ weight.double().T
        row: dict[str, object] = {"bench": "product_rounding", "summands": summands}
        for name, product in products.items():
            error = product(x, weight).double() - exact
            row[f"{name}_max"] = float(f"{error.abs().max():.3g}")
            row[f"{name}_rms"] = float(f"{error.square().mean().sqrt():.3g}")
        Console().print(row)
        rows.append({**row, **environment()})
    append_rows(rows)


if __name__ == "__main__":
    main()
