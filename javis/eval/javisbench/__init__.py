"""JavisBench (JavisDiT, arXiv 2503.23377, section 4): the evaluation harness behind ``javis eval javisbench``.

Read in this order: taxonomy.py and prompts.py (what is asked for), layouts.py (which file answers it), measure.py and
store.py (what is measured of one clip, and kept), references.py (real clips, or their cached features), metrics.py
and figures.py (the figures of all clips and of each category), harness.py (all of it), page.py and text.py (results for
people), command.py.
"""

from __future__ import annotations

from pathlib import Path

SAMPLE_PROMPTS = Path(__file__).with_name("sample_prompts.csv")
"""20 prompts in the format of JavisBench.csv that the built-in model can make, written for this package."""
