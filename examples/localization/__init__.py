"""Localization on drawn lesions: the images, and the comparison of networks, poolings and losses."""
