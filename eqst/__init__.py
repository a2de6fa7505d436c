"""EQST: one-shot EQ style transfer. See the README for the layout."""
