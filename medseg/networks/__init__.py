"""Networks, one architecture a file, built from the numbers in a plan."""
