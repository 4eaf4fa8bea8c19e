"""How the experts of a mixture are computed: each file's ``make(experts, hidden, scores, chosen)`` is a function."""
