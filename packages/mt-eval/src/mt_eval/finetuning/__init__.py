"""Fine-tuning BERT for tasks on whole texts: their files, the recipe of a run, predictions and ensembles of them."""
