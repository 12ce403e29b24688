"""GroupNorm and SiLU. Read api.py first."""
