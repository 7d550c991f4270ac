"""What asks the web: addresses, connections, answers, and the limits that hosts and owners set."""
