"""Modules that an installation puts at the top level, under the names that programs for other servers import."""
