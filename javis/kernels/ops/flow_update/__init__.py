"""Guidance and solver update of both modalities. Read api.py first."""
