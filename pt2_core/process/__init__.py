"""What a process does apart from its work: signals, children, locks, temporary files, memory."""
