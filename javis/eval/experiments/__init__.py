"""The questions a reader of the paper has, one experiment each: do the priors matter, what does attention look at, ...

``javis eval experiments NAME...`` runs them (command.py). An experiment is a module with ``TITLE``, ``COUNT`` (what
``--count`` is by default), ``run(context)`` -> figures as plain json values, ``section(row)`` -> markdown, and
``plot(row, path)``; a row is the figures with what all rows say. docs/experiments.md is made of the sections.
"""

from __future__ import annotations

# Name -> module, in the order of the page.
EXPERIMENTS: dict[str, str] = {
    "priors": "javis.eval.experiments.priors",
    "attention": "javis.eval.experiments.attention",
    "negatives": "javis.eval.experiments.negatives",
    "alignment": "javis.eval.experiments.alignment",
    "multi_event": "javis.eval.experiments.multi_event",
    "collapse": "javis.eval.experiments.collapse",
}
