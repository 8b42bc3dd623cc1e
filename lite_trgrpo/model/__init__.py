"""Models behind the Policy protocol. Imported lazily: importing this package imports no model library."""
