"""Arithmetic on the CPU in which a request's numbers do not depend on the other requests, to the last bit."""
