"""Records become words, tables and figures."""
