"""Programs that show what the library does: ``python -m quantlib.examples.demo``."""
