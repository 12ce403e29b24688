"""Measures with exact truth: event detectors, attribute readers, sync reports, and the report on the built-in world.

Read in this order: matching.py, tracking.py, motion.py (picture), spectral.py, onsets.py (sound), sync.py,
attributes.py, world_report.py. Numpy alone; nothing is trained.
"""
