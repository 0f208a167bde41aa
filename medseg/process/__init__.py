"""Volume to volume: resampling, normalization and the arithmetic of patches."""
