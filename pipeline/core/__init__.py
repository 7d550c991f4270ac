"""What every package stands on: records, files, stages, configuration, processes."""
