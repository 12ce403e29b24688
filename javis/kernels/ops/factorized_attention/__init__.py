"""Self-attention along one axis. Read api.py first."""
