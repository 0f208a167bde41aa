"""Models: their plan and networks, and the sliding window that runs them."""
