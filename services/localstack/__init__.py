"""The local stack: real servers and the services, as child processes."""
