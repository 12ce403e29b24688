"""Adaptive layer norm with a float8 output. Read api.py first."""
