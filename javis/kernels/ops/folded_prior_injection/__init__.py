"""Attention to the priors with the projections folded into its keys and values. Read api.py first."""
