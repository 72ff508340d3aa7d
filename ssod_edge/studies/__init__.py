"""Many runs at once: grids of settings, and the tables of the paper."""
