"""How queries, keys and values lie in their matrices: each file's ``make(spec, …)`` is an `Attention`."""
