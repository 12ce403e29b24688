"""Data sets: manifests, their doctor, buckets, shards, feeding, negatives, stored latents; sizes of clips."""
