"""The node daemon: everything that runs in the process `kvd`."""
