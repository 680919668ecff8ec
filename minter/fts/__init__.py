"""What FTS speaks: jobs, monitoring messages and its REST interface."""
