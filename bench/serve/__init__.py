"""What is asked of a running service to find out how fast and how hard to break it is."""
