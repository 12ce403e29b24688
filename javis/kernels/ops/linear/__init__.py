"""Linear layer. Read api.py first."""
