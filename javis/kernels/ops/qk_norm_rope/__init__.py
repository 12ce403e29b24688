"""Per-head RMS norm and RoPE of packed projections. Read api.py first."""
