"""Ranks as processes: how they are numbered, started, connected, watched and ended, and the axes that they form."""
