"""Attention of tokens to the caption. Read api.py first."""
