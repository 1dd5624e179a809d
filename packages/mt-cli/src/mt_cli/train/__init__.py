"""`mt train`: composes data, model and training loop."""
