"""Sizes of clips and, in later versions, data sets."""
