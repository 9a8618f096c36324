"""What the pipelines share: losses by name, files, options, processes."""
