"""Adaptive layer norm. Read api.py first."""
