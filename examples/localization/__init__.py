"""Localization on generated lesions: the images, and the comparison of networks, poolings and losses."""
