"""Methods beside the default one; each module says what it answers, its cost and its limits."""
