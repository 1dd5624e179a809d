"""`mt verify`: the proof, for a user's own configuration, that a layout computes what one rank computes."""
