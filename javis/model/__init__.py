"""The JavisDiT model and its parts; plain PyTorch, imports no kernel."""
