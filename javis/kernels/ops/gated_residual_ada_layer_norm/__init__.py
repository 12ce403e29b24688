"""Gated residual and adaptive layer norm. Read api.py first."""
