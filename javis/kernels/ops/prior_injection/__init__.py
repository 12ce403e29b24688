"""Attention of tokens to the priors. Read api.py first."""
