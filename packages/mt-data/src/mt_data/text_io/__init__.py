"""Text on the disk: which files are read, their lines and JSON documents, and ordered maps over worker processes."""
