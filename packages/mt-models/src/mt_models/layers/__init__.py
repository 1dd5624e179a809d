"""Layers that models are composed of, each written for one device: none knows of groups, ranks or collectives."""
