"""Action following, video quality, intervals by bootstrap, and what they say together."""
