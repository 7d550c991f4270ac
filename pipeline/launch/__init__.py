"""Job scripts for a cluster."""
