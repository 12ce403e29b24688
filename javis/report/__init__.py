"""One HTML page of a training run, of a folder of clips or of an evaluation: ``javis report``.

Read in this order: read.py (what is in a folder), page.py (the sections), then html.py, plots.py, embed.py.
"""
