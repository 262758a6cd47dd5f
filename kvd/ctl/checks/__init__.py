"""What `kvdctl doctor` looks at, one subject per file. Each check returns findings and has a deadline."""
