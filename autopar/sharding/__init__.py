"""How one operator may be split: rules, placements, and the law of an edge."""
