"""Whole training states between formats: weights, optimizer, scheduler, random state and position."""
