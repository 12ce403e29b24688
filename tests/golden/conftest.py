"""Turns every case of the golden folder into one test; skips with a message where there is no such folder."""

from __future__ import annotations

import pytest

from .harness import ENVIRONMENT_VARIABLE, case_names, golden_dir


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" not in metafunc.fixturenames:
        return
    folder = golden_dir()
    names = case_names(folder)
    if names:
        metafunc.parametrize("golden_case", names)
        return
    reason = f"no golden cases in {folder} (set {ENVIRONMENT_VARIABLE} to the folder that holds <case>.json)"
    metafunc.parametrize("golden_case", [pytest.param("", marks=pytest.mark.skip(reason=reason), id="absent")])
