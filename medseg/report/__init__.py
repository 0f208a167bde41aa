"""What comes out of a segmentation: scores against a reference, measurements, pictures."""
