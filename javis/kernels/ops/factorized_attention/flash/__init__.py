"""Attention over sequences of any length, with an online softmax. Read triton_impl.py."""
