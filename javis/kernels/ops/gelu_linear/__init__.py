"""Linear layer followed by tanh-GELU. Read api.py first."""
