"""From raw tiles to a prepared data set: readers, splits, colour, attributes, prompts, caches."""
