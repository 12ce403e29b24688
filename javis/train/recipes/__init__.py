"""The training stages of the paper as declarative recipes: ``javis train audio|prior|joint`` (docs/training.md)."""
