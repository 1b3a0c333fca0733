"""What neither dialect has, under /api/v1, and the probes."""
