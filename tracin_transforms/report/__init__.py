"""Pictures: self-contained pages with the results."""
