"""Names, flags and variables of the servers that Troupe replaces."""
