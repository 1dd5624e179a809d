"""The models, each composed of layers; `base.py` is what all of them share."""
