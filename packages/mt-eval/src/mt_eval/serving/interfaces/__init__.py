"""What clients may ask: bodies of requests, the calls that they become, and one module for each interface."""
