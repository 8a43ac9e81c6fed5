"""One page that shows what was measured of a model."""
