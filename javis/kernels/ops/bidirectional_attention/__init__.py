"""bidirectional_attention: start with api.py."""
