"""``make gpu``: everything that needs a GPU, in sections that can be stopped and taken up again (docs/gpu.md)."""
