"""Replays of the official code's recorded inputs and outputs. See harness.py."""
