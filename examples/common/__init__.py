"""Modules that the examples share: losses by name, files, options, processes."""
