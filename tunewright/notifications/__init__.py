"""What is said, to whom, once: channels of projects, an outbox beside the jobs, and what delivers it."""
