"""`mt plan`: predict memory, communication and step time of a run."""
