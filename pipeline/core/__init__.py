"""The foundation of all packages: records, files, stages, configuration, processes."""
