"""Centred keys: what is subtracted from keys before quantisation, and where it comes from."""

AUTO = "auto"  # as ``centre``: by what there is, and measured at a model's first use (first_use.py)
