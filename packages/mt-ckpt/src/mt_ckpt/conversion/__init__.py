"""Conversions: from the format of any loader to that of any saver, with a proof that nothing changed."""
