"""Detectors on these backbones, their training on data in COCO's format, and a cascade of two of them."""
