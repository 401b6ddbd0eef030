"""The story of a conversion, told in order: open, prepare, produce."""
